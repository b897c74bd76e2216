"""Jobs, deliveries, events."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def text(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text(), nullable=False) for name in names]


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", sa.Integer(), nullable=False),
        *text("id", "state", "study_uid", "series_uid", "accession", "patient_id", "modality", "sop_class_uid"),
        *text("series_number", "series_description", "study_date", "calling_ae", "peer_address"),
        sa.Column("created", TIME, nullable=False),
        sa.Column("updated", TIME, nullable=False),
        sa.Column("instances", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        *text("reason_code", "reason", "stage", "supersedes", "source_digest", "lease_owner"),
        sa.Column("lease_until", TIME, nullable=True),
        sa.Column("not_before", TIME, nullable=True),
        sa.Column("has_result", sa.Boolean(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_jobs"),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_state_seq", "jobs", ["state", "seq"])
    for column in ("study_uid", "series_uid", "accession", "patient_id", "created"):
        op.create_index(f"ix_jobs_{column}", "jobs", [column])

    op.create_table(
        "deliveries",
        sa.Column("id", sa.Integer(), nullable=False),
        *text("job_id", "destination", "kind", "encoding", "series_uid"),
        sa.Column("instances", sa.Integer(), nullable=False),
        *text("state"),
        sa.Column("sent", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt", TIME, nullable=True),
        *text("reason_code", "reason"),
        sa.Column("updated", TIME, nullable=False),
        *text("lease_owner"),
        sa.Column("lease_until", TIME, nullable=True),
        sa.Column("statuses", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_deliveries"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_deliveries_job_id_jobs"),
        sa.UniqueConstraint(
            "job_id", "destination", "kind", "encoding", name="uq_deliveries_job_id_destination_kind_encoding"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_deliveries_state_next_attempt", "deliveries", ["state", "next_attempt"])

    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("time", TIME, nullable=False),
        *text("job_id", "study_uid", "accession", "stage", "code", "text"),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
        sqlite_autoincrement=True,
    )
    for column in ("time", "job_id", "study_uid", "accession", "code"):
        op.create_index(f"ix_events_{column}", "events", [column])


def downgrade() -> None:
    raise NotImplementedError("the ledger only goes forward: restore the backup")
