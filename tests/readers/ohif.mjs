// Opens studies in OHIF with a headless Chromium and writes what the viewer holds, as JSON, and screenshots.
// node ohif.mjs JOB.json: {modules, chromium, profile, url, out, pages: [{name, mode, study, volumes, center, roi, show}]}
//   volumes: how many volumes the page must have loaded; center: LPS mm that every plane is moved to;
//   roi: {center, radius_mm} of an ellipse and a probe in the axial PT viewport;
//   show: modalities that are put into the viewport one after the other;
//   chosen: {viewport, series} of a series that is double-clicked at the end, with that viewport active.
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const READY_MS = 240_000; // software rendering on a busy machine
const POLL_MS = 250;
const QUIET_POLLS = 4; // in a row, without a rendered image, a changed element or a request
const SEGMENTS_MS = 30_000; // a SEG that the viewer cannot draw is given up after this
const WINDOW = { width: 1280, height: 800 };
const SHOWN_SHARE = 0.64; // of the way from the head: liver and kidneys
const FLAGS = [
  '--no-sandbox',
  '--use-gl=angle',
  '--use-angle=swiftshader',
  '--enable-unsafe-swiftshader',
  '--ignore-gpu-blocklist',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-dev-shm-usage',
  '--disable-sync',
  '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
];

const job = JSON.parse(readFileSync(process.argv[2], 'utf-8'));
const puppeteer = createRequire(join(job.modules, 'package.json'))('puppeteer-core');

async function waitFor(page, what, condition, ...args) {
  try {
    await page.waitForFunction(condition, { timeout: READY_MS, polling: 500 }, ...args);
  } catch (error) {
    throw new Error(`OHIF: ${what} did not happen: ${error.message}`);
  }
}

// Wait until the viewer has nothing more to do: a fixed sleep is too long for an idle machine and too short for a busy one.
async function settle(page) {
  await page.waitForNetworkIdle({ idleTime: QUIET_POLLS * POLL_MS, timeout: READY_MS });
  await page.evaluate(becomesQuiet, POLL_MS, QUIET_POLLS);
}

// --- run inside the viewer ------------------------------------------------------------------------------------------

// Count what changes, from before the viewer's first script on. (Capturing sees events that do not bubble.)
const countChanges = () => {
  window.changes = 0;
  const one = () => {
    window.changes += 1;
  };
  document.addEventListener('CORNERSTONE_IMAGE_RENDERED', one, true);
  new MutationObserver(one).observe(document, { childList: true, characterData: true, subtree: true });
};

const becomesQuiet = async (pollMs, polls) => {
  for (let same = 0; same < polls; ) {
    const before = window.changes;
    await new Promise(done => setTimeout(done, pollMs));
    same = window.changes === before ? same + 1 : 0;
  }
};

const volumesAreLoaded = wanted => {
  const found = window.cornerstone?.cache.getVolumes() ?? [];
  return found.length >= wanted && found.every(volume => volume.loadStatus?.loaded);
};

const everyViewportShowsSomething = () => {
  const service = window.services?.cornerstoneViewportService;
  const ids = service ? [...service.viewportsById.keys()] : [];
  const shows = id => {
    const viewport = service.getCornerstoneViewport(id);
    return (viewport?.getActors?.().length ?? 0) > 0 || Boolean(viewport?.getCurrentImageId?.());
  };
  return ids.length > 0 && ids.every(shows);
};

const moveTo = center => {
  const service = window.services.cornerstoneViewportService;
  for (const id of service.viewportsById.keys()) {
    const viewport = service.getCornerstoneViewport(id);
    if (viewport.jumpToWorld && !id.startsWith('mip')) {
      viewport.jumpToWorld(center);
      viewport.render();
    }
  }
};

const shownSeries = () => {
  const service = window.services.cornerstoneViewportService;
  const ids = [...service.viewportsById.keys()];
  return ids.map(id => ({ id, series: service.getViewportDisplaySets(id).map(set => set.SeriesInstanceUID) }));
};

const report = () => {
  const { displaySetService, cornerstoneViewportService: viewports } = window.services;
  const displaySets = displaySetService.getActiveDisplaySets();
  const seriesOf = imageIds =>
    displaySets.find(set => set.images?.some(image => imageIds.includes(image.imageId)))?.SeriesInstanceUID;
  const sliceMaxima = volume => {
    const values = volume.voxelManager.getCompleteScalarDataArray();
    const size = volume.dimensions[0] * volume.dimensions[1];
    return Array.from({ length: volume.dimensions[2] }, (_, slice) =>
      values.subarray(slice * size, (slice + 1) * size).reduce((high, value) => (value > high ? value : high), -1e9)
    );
  };
  return {
    displaySets: displaySets.map(set => ({
      modality: set.Modality,
      number: set.SeriesNumber,
      description: set.SeriesDescription,
      series: set.SeriesInstanceUID,
      reconstructable: Boolean(set.isReconstructable),
      supported: !set.unsupported,
      handler: set.SOPClassHandlerId,
    })),
    viewports: [...viewports.viewportsById.keys()].map(id => {
      const viewport = viewports.getCornerstoneViewport(id);
      return {
        id,
        series: viewports.getViewportDisplaySets(id).map(set => set.SeriesInstanceUID),
        voi: viewport.getProperties?.().voiRange,
        blendMode: viewport.getBlendMode?.(),
        text: viewport.element.closest('[data-cy^="viewport"], .viewport-wrapper')?.innerText ?? '',
      };
    }),
    volumes: window.cornerstone.cache.getVolumes().map(volume => ({
      series: seriesOf(volume.imageIds),
      dimensions: [...volume.dimensions],
      spacing: [...volume.spacing],
      origin: [...volume.origin],
      direction: [...volume.direction],
      array: volume.voxelManager.getCompleteScalarDataArray().constructor.name,
      scaling: window.cornerstone.metaData.get('scalingModule', volume.imageIds[0]) ?? null,
      sliceMaxima: sliceMaxima(volume),
    })),
  };
};

// Click the button that says this, once it is there.
const click = label => {
  const found = [...document.querySelectorAll('button, span')].find(one => one.innerText.trim() === label);
  found?.click();
  return Boolean(found);
};

// Put a series into the active viewport, as a double click on its thumbnail does: the one that has this value there.
const show = (key, value) => {
  const { displaySetService, hangingProtocolService, viewportGridService } = window.services;
  const found = displaySetService.getActiveDisplaySets().find(set => set[key] === value);
  const viewportId = viewportGridService.getActiveViewportId();
  const { displaySetInstanceUID } = found;
  const wanted = hangingProtocolService.getViewportsRequireUpdate(viewportId, displaySetInstanceUID, true);
  viewportGridService.setDisplaySetsForViewports(wanted);
};

// To a slice at a share of the way from the head, in the stack or volume that is shown.
const goTo = async share => {
  const { cornerstoneViewportService, viewportGridService } = window.services;
  const viewport = cornerstoneViewportService.getCornerstoneViewport(viewportGridService.getActiveViewportId());
  const slices = viewport.getNumberOfSlices();
  if (slices > 1) {
    await window.cornerstone.utilities.jumpToSlice(viewport.element, { imageIndex: Math.round(share * slices) });
  }
};

const shownNow = () => {
  const { cornerstoneViewportService, viewportGridService } = window.services;
  const viewport = cornerstoneViewportService.getCornerstoneViewport(viewportGridService.getActiveViewportId());
  return { voi: viewport?.getProperties?.().voiRange ?? null, text: document.body.innerText };
};

// Of each segment that is drawn: its voxels, the sum of their rows and that of their columns. (A label is in the list even
// where OHIF has put no frame of it anywhere, and as many voxels may lie elsewhere.)
const segmentations = () => {
  const drawn = {};
  for (const { segments, representationData } of window.cornerstoneTools.segmentation.state.getSegmentations()) {
    for (const imageId of representationData.Labelmap?.imageIds ?? []) {
      const image = window.cornerstone.cache.getImage(imageId);
      image.voxelManager.getScalarData().forEach((value, index) => {
        if (value) {
          const sums = (drawn[segments[value].label] ??= [0, 0, 0]);
          sums[0] += 1;
          sums[1] += Math.floor(index / image.columns);
          sums[2] += index % image.columns;
        }
      });
    }
  }
  return drawn;
};

const segmentsAreThere = () => window.services.segmentationService.getSegmentations().length > 0;

const drawRegions = ({ center: [x, y, z], radius_mm: r }) => {
  const { EllipticalROITool, ProbeTool } = window.cornerstoneTools;
  EllipticalROITool.hydrate('ptAXIAL', [[x, y + r, z], [x, y - r, z], [x - r, y, z], [x + r, y, z]]);
  ProbeTool.hydrate('ptAXIAL', [[x, y, z]]);
  window.services.cornerstoneViewportService.getCornerstoneViewport('ptAXIAL').render();
};

// One viewport over the whole page, as a double click in it does: first it becomes the active one.
const activate = viewportId => window.services.viewportGridService.setActiveViewportId(viewportId);
const enlargeTheActive = () => {
  window.commandsManager.runCommand('toggleOneUp');
};

// A region lies over CT and PT alike: what is asked is what it says of the PT.
const regions = () => {
  const drawn = window.cornerstoneTools.annotation.state.getAllAnnotations();
  const stats = one => Object.values(one.data.cachedStats ?? {}).filter(found => found.Modality === 'PT');
  return drawn
    .filter(one => ['EllipticalROI', 'Probe'].includes(one.metadata.toolName))
    .flatMap(one => stats(one).map(({ mean, max, value, modalityUnit }) => ({
      tool: one.metadata.toolName, mean, max, value, unit: modalityUnit,
    })));
};

const bothAreMeasured = () => {
  const drawn = window.cornerstoneTools.annotation.state.getAllAnnotations();
  const asked = drawn.filter(one => ['EllipticalROI', 'Probe'].includes(one.metadata.toolName));
  const measured = one => Object.values(one.data.cachedStats ?? {}).some(found => found.Modality === 'PT');
  return asked.length === 2 && asked.every(measured);
};

// --- outside ---------------------------------------------------------------------------------------------------------

// Each of these modalities in turn, with a picture of it.
async function showEach(page, name, modalities) {
  const shown = {};
  for (const modality of modalities) {
    await page.evaluate(show, 'Modality', modality);
    await settle(page);
    if (modality === 'SEG') {
      await page.waitForFunction(segmentsAreThere, { timeout: SEGMENTS_MS, polling: POLL_MS }).catch(() => {});
      await settle(page);
    }
    if (['CT', 'PT', 'SEG'].includes(modality)) {
      await page.evaluate(goTo, SHOWN_SHARE);
      await settle(page);
    }
    await page.screenshot({ path: join(job.out, `${name}-${modality}.png`) });
    shown[modality] = await page.evaluate(shownNow);
  }
  return { ...shown, segments: await page.evaluate(segmentations) };
}

async function open(browser, { name, mode, study, volumes = 0, center, roi, show: modalities, chosen }) {
  const page = await browser.newPage();
  await page.evaluateOnNewDocument(countChanges);
  const errors = [];
  const logged = [];
  page.on('pageerror', error => errors.push(String(error)));
  page.on('console', message => {
    if (message.type() === 'error' || message.text().includes('Error Boundary')) {
      logged.push(message.text());
    }
  });
  await page.goto(`${job.url}/${mode}?StudyInstanceUIDs=${study}`, { waitUntil: 'domcontentloaded', timeout: READY_MS });
  await waitFor(page, `${name}: viewports`, everyViewportShowsSomething);
  await waitFor(page, `${name}: ${volumes} volumes`, volumesAreLoaded, volumes);
  if (center) {
    await page.evaluate(moveTo, center);
  }
  if (mode === 'viewer' && !tourSkipped) {
    await waitFor(page, `${name}: the tour that a new user gets`, click, 'Skip all');
    tourSkipped = true; // the browser's profile remembers it
  }
  await settle(page);
  await page.screenshot({ path: join(job.out, `${name}.png`) });
  const found = await page.evaluate(report);
  if (roi) {
    await page.evaluate(drawRegions, roi);
    await waitFor(page, `${name}: the regions' statistics`, bothAreMeasured);
    found.regions = await page.evaluate(regions);
    await page.evaluate(activate, 'ptAXIAL');
    await settle(page);
    await page.evaluate(enlargeTheActive);
    await settle(page);
    await page.screenshot({ path: join(job.out, `${name}-region.png`) });
  }
  if (modalities) {
    found.shown = await showEach(page, name, modalities);
  }
  if (chosen) {
    await page.evaluate(activate, chosen.viewport);
    await settle(page);
    const before = logged.length;
    await page.evaluate(show, 'SeriesInstanceUID', chosen.series);
    await settle(page);
    await page.evaluate(moveTo, center);
    await settle(page);
    await page.screenshot({ path: join(job.out, `${name}-chosen.png`) });
    found.chosen = { viewports: await page.evaluate(shownSeries), logged: logged.splice(before) };
  }
  await page.close();
  return { ...found, errors, logged };
}

const browser = await puppeteer.launch({
  executablePath: job.chromium,
  headless: true,
  userDataDir: job.profile,
  protocolTimeout: READY_MS,
  timeout: READY_MS,
  args: FLAGS,
  defaultViewport: WINDOW,
});
let tourSkipped = false;
try {
  const pages = {};
  for (const page of job.pages) {
    pages[page.name] = await open(browser, page);
  }
  writeFileSync(join(job.out, 'report.json'), JSON.stringify(pages));
} finally {
  await browser.close();
}
