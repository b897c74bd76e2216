"""The DICOM conformance statement, generated from the configuration and the code's own tables (PS3.2)."""
