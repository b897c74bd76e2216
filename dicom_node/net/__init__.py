"""The DICOM network: who may talk to us, what we take, what we answer (PS3.7, PS3.8)."""
