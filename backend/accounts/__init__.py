"""Accounts: users, roles, passwords, server-side sessions, back-off after failed logins."""
