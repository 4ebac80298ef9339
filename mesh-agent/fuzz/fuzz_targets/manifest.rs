//! A manifest file: whatever it says, what it said before is kept or replaced, and the reader survives.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::source::assemble::{Entry, assemble};
use mesh_agent::source::directory::file::FileObjects;

fuzz_target!(|data: &[u8]| {
    for (json, place) in [(false, "x.yaml"), (true, "x.json"), (false, "nodes/a.margay.yaml")] {
        let objects = FileObjects::parse(&FileObjects::default(), json, data.to_vec().into());
        assemble(&[Entry { place, objects: &objects }], "a");
    }
});
