"""Chat templates: messages become the text of a prompt, within limits on what an untrusted template may do."""
