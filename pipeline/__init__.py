"""From a CT series to a synthetic PET series: pure image work, no network, no ledger."""
