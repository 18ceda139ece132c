"""The HTTP server: OpenAI's interface over one loaded model.

A request is validated (``asked``), becomes a ``Completion`` (``chat_completions``, ``text_completions``) and is
computed and sent by ``replies``. Needs the extra ``server``: starlette and uvicorn.
"""
