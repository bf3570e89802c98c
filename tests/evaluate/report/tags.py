"""The start tags of a page."""

import html.parser


class Tags(html.parser.HTMLParser):
    """`found`: (name, attributes) of each, in order."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
