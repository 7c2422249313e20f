"""Text in: files, folders and datasets become blocks of tokens."""
