-- Orthanc sends every CT series to the node when it is stable: the whole series over one association.
--
-- Only CT goes: the node's results are PT and OT, so that nothing it made can go round in a circle. What the node cannot
-- use (a localizer, a short series) it refuses by itself, and `dicom-node why ACCESSION` says why.
-- Slices that come later make the series stable again; it is sent again, and the node knows the slices that it has.

local NODE = 'synpet' -- the node's name in "DicomModalities"

local function is_ours(tags)
  return string.sub(tags['SeriesDescription'] or '', 1, 9) == 'SYNTHETIC'
end

function OnStableSeries(seriesId, tags, metadata)
  if tags['Modality'] ~= 'CT' or is_ours(tags) then
    return
  end
  -- Asynchronous: the job waits in Orthanc's queue (GET /jobs), and a node that is down does not stop Orthanc
  local request = { Resources = { seriesId }, Asynchronous = true }
  if RestApiPost('/modalities/' .. NODE .. '/store', DumpJson(request, true)) == nil then
    print('dicom-node: CT series ' .. seriesId .. ' could not be queued for ' .. NODE .. ': see the line above')
  end
end
