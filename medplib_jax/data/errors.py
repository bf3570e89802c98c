"""The one error of the data code, and its mild form.

It says which file, which record, what is wrong, what was expected and what was found.
"""


class DataError(ValueError):
    """A record or file that cannot be used.

    `record` is the index in the annotation file, None where no record is involved.
    """

    def __init__(self, file: str, record: int | None, what: str, expected: str = "", found: str = ""):
        super().__init__(file, record, what, expected, found)  # the plain arguments, so that it crosses process borders
        self.file, self.record, self.what, self.expected, self.found = file, record, what, expected, found

    def __str__(self) -> str:
        place = self.file if self.record is None else f"{self.file}, record {self.record}"
        detail = [f"{name} {value}" for name, value in (("expected", self.expected), ("found", self.found)) if value]
        return "; ".join([f"{place}: {self.what}", *filter(None, [", ".join(detail)])])

    def in_record(self, file: str, record: int) -> "DataError":
        """The same problem, met while reading a record that refers to this error's file."""
        return type(self)(file, record, f"{self.what} ({self.file})", self.expected, self.found)

    def as_dict(self) -> dict:
        """A line for a log of skipped records."""
        return {
            "file": self.file,
            "record": self.record,
            "what": self.what,
            "expected": self.expected,
            "found": self.found,
        }


class Notice(DataError):
    """Something unusual about a record that is used all the same, such as a converted picture.

    It is passed on, never raised.
    """

    def as_dict(self) -> dict:
        return {**super().as_dict(), "used": True}


Notices = list[Notice] | list[DataError]  # notices are appended, to those of their own or to all problems
