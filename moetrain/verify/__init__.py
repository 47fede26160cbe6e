"""``moetrain verify``: a layout is proved equal to one process before it costs anybody a GPU hour."""
