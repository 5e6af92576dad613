"""``view``: a page on this machine that shows slides, and what was found on them, at any zoom.

`serving.Viewer` serves it, `server` answers its requests, `cohort` knows which slides there are and what belongs to
them, `tiles` reads the pieces that a screen shows, `paint` makes pictures of them, and `work` keeps what all of this
costs within bounds. `static/` is the page.
"""
