"""The class of service of an API key; keys that are there already are standard."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "api_keys",
        sa.Column("service_class", sa.String(length=32), nullable=False, server_default="standard"),
    )


def downgrade() -> None:
    # Not in batch mode, which would make the table anew: usage records refer to it.
    op.drop_column("api_keys", "service_class")
