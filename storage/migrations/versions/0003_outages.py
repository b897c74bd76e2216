"""Since when a delivery finds its destination down, and how many of its attempts did: those count for nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deliveries", sa.Column("failing_since", sa.DateTime(timezone=True), nullable=True))
    op.add_column("deliveries", sa.Column("outages", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    raise NotImplementedError("the ledger only goes forward: restore the backup")
