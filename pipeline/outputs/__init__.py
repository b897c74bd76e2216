"""What a job leaves: DICOM objects, numbers and a picture, encoded as bytes; nothing here touches a disk."""
