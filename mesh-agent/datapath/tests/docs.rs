//! docs/datapath.md lists what is counted.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use mesh_datapath::counters::Drop;
use mesh_uapi::stats::offload;

const DOCUMENTED: &str = include_str!("../../../docs/datapath.md");

#[test]
fn every_reason_for_a_drop_is_documented_and_no_other() {
    let table = DOCUMENTED.split("| reason | what was dropped |\n").nth(1).unwrap();
    let rows = table.lines().skip(1).take_while(|line| line.starts_with('|'));
    let cells = rows.map(|row| row.split('|').nth(1).unwrap());
    let documented: BTreeSet<&str> = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
    assert_eq!(documented, Drop::ALL.iter().map(|reason| reason.name()).collect());
}

#[test]
fn every_offload_is_documented() {
    for name in [offload::TUN_TSO, offload::TUN_USO, offload::UDP_GSO, offload::UDP_GRO] {
        assert!(DOCUMENTED.contains(&format!("`{name}`")), "{name}");
    }
}
