// What OHIF asks for an SUV, asked directly: node calculate_suv.mjs MODULES FILE.dcm...
// Prints {factors: [{suvbw, ...}]} or {error: "..."}; the attributes are gathered as OHIF gathers them.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const [modules, ...files] = process.argv.slice(2);
const require = createRequire(join(modules, 'package.json'));
const { calculateSUVScalingFactors } = require('@cornerstonejs/calculate-suv');
const { data: { DicomMessage, DicomMetaDictionary } } = require('dcmjs');

console.warn = () => {}; // a missing PatientSize: SUV by body surface is not asked for

function read(path) {
  const bytes = readFileSync(path);
  const { dict } = DicomMessage.readFile(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  return DicomMetaDictionary.naturalizeDataset(dict);
}

function inputs(instance) {
  const [medicine] = instance.RadiopharmaceuticalInformationSequence ?? [];
  if (!medicine) {
    throw new Error('RadiopharmaceuticalInformationSequence has no item');
  }
  const keys = [
    'SeriesDate', 'SeriesTime', 'AcquisitionDate', 'AcquisitionTime', 'PatientSex', 'PatientSize', 'PatientWeight',
    'CorrectedImage', 'Units', 'DecayCorrection', 'FrameReferenceTime', 'ActualFrameDuration',
  ];
  const ofMedicine = [
    'RadionuclideTotalDose', 'RadionuclideHalfLife', 'RadiopharmaceuticalStartTime', 'RadiopharmaceuticalStartDateTime',
  ];
  const pick = (from, names) => Object.fromEntries(names.map(name => [name, from[name]]));
  return { ...pick(instance, keys), ...pick(medicine, ofMedicine) };
}

const instances = files.map(read);
const doses = instances.map(one => one.RadiopharmaceuticalInformationSequence?.[0]?.RadionuclideTotalDose);
try {
  console.log(JSON.stringify({ factors: calculateSUVScalingFactors(instances.map(inputs)), doses }));
} catch (error) {
  console.log(JSON.stringify({ error: error.message, doses }));
}
