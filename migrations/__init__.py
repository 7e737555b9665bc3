"""The steps from one database schema to the next, for PostgreSQL and SQLite alike."""
