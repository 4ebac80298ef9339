//! Every input the fuzzers found worth keeping, through the same checks.
#![allow(clippy::unwrap_used)]

#[path = "../../fuzz/checks.rs"]
#[allow(unreachable_pub)]
mod checks;

fn replay(target: &str, check: fn(&[u8])) {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        check(&std::fs::read(entry.unwrap().path()).unwrap());
        inputs += 1;
    }
    assert!(inputs >= 4, "{}: only {inputs} inputs", dir.display());
}

#[test]
fn uapi_requests() {
    replay("uapi_set", checks::uapi_set);
}

#[test]
fn uapi_replies() {
    replay("uapi_get", checks::uapi_get);
}

#[test]
fn datagrams() {
    replay("datagram", checks::datagram);
}

#[test]
fn ip_packets() {
    replay("ip_packet", checks::ip_packet);
}

#[test]
fn large_packets() {
    replay("split", checks::split);
}

#[test]
fn joined_packets() {
    replay("joined", checks::joined);
}
