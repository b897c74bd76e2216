"""Read a series with whichever SimpleITK comes first: PATH_OF_SIMPLEITK FOLDER OUT.npy; prints what it says of it."""

from __future__ import annotations

import json
import sys

import numpy as np

if __name__ == "__main__":
    library, folder, out = sys.argv[1:]
    sys.path.insert(0, library)
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    image = reader.Execute()
    np.save(out, sitk.GetArrayFromImage(image))
    said = {"version": sitk.Version.VersionString(), "itk": sitk.Version.ITKVersionString()}
    said |= {"size": image.GetSize(), "spacing": image.GetSpacing(), "origin": image.GetOrigin()}
    print(json.dumps(said | {"direction": image.GetDirection()}))
