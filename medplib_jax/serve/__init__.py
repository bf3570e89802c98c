"""A server for one checkpoint:

A page to draw on, and the HTTP interfaces that other people's tools speak. Needs the extra `serve`.
"""
