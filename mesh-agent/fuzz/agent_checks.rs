//! What must hold for any bytes that the control daemon reads. The fuzz targets call these, and so does the
//! test that replays the corpora.

use std::collections::BTreeSet;

use mesh_agent::ipam::journal::replay;
use mesh_api::cni::Request;

/// An IPAM journal: whatever is in it, no address is in two leases, and what could be read reads the same again.
pub fn ipam_journal(data: &[u8]) {
    let read = replay(data);
    assert!(read.good <= data.len());
    let mut seen = BTreeSet::new();
    for ip in read.state.leases.values().flat_map(|lease| &lease.ips) {
        assert!(seen.insert(*ip), "{ip} is leased twice");
    }
    let again = replay(&data[..read.good]);
    assert_eq!((again.state, again.damage, again.seq), (read.state, read.damage, read.seq));
}

/// A CNI request line: understood the same way when it is told again.
pub fn cni_request(data: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let text = serde_json::to_vec(&request).expect("a request has no map with odd keys");
        assert_eq!(serde_json::from_slice::<Request>(&text).expect("rendered"), request);
    }
}
