"""The engine behind OpenAI's HTTP interface; see app.py. Needs the extra `serve`."""
