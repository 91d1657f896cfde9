"""Runs migrations on the database that `backend.schema` hands over."""

from alembic import context

from backend.database import Database
from backend.schema import metadata

database: Database = context.config.attributes["database"]

with database.engine.execution_options(lectern_write=True).connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=database.is_sqlite,
        transactional_ddl=True,
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
