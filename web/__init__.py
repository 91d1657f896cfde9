"""The pages: chat, search, keys, course documents, users and monitoring. Speaks HTTP to the backend."""
