"""The chat template under the name that it had before ``ggufmoe.templates``, for programs that import it from here."""

from ggufmoe.templates.jinja_template import ChatTemplate

__all__ = ["ChatTemplate"]
