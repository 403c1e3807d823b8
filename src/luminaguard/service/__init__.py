"""The service: what people may look at and answer without having the database."""
