"""The pages: chat, search, keys, course documents, users, monitoring. HTTP to the backend only."""
