"""What a destination proves: the goal of a delivery, the times of its states, Storage Commitment transactions."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    # deliveries of earlier versions ended at SENT, and nobody asks for their proof afterwards
    op.add_column("deliveries", sa.Column("goal", sa.Text(), nullable=False, server_default="SENT"))
    op.add_column("deliveries", sa.Column("checks", sa.Integer(), nullable=False, server_default="0"))
    for name in ("sent_at", "committed_at", "visible_at"):
        op.add_column("deliveries", sa.Column(name, TIME, nullable=True))
    op.create_table(
        "commitments",
        sa.Column("transaction_uid", sa.Text(), nullable=False),
        sa.Column("delivery_id", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("asked", TIME, nullable=False),
        sa.Column("reported", TIME, nullable=True),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("transaction_uid", name="pk_commitments"),
        sa.ForeignKeyConstraint(["delivery_id"], ["deliveries.id"], name="fk_commitments_delivery_id_deliveries"),
    )
    op.create_index("ix_commitments_delivery_id", "commitments", ["delivery_id"])


def downgrade() -> None:
    raise NotImplementedError("the ledger only goes forward: restore the backup")
