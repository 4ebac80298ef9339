#![allow(clippy::unwrap_used)]
use super::*;
use crate::desired::{WireguardDevice, WireguardPeer};

fn key(byte: u8) -> PublicKey {
    PublicKey::from_bytes([byte; 32])
}

fn planned() -> Board {
    let peer = WireguardPeer {
        name: "b".into(),
        endpoint: "192.0.2.2:51820".parse().ok(),
        allowed_ips: ["10.244.2.0/24".parse().unwrap()].into(),
        persistent_keepalive: 0,
        learned: false,
        reach: Default::default(),
        connect: false,
    };
    let device = WireguardDevice {
        public_key: key(1),
        listen_port: 51820,
        fwmark: 0,
        preshared: false,
        peers: [(key(2), peer)].into(),
    };
    let desired =
        Desired { generation: 3, wireguard: [("margay0".to_owned(), device)].into(), ..Desired::default() };
    let board = Board::new(&["policy", "routes"]);
    let snapshot = Snapshot { generation: 3, ..Snapshot::default() };
    board.planned(Arc::new(snapshot), Arc::new(desired), Vec::new());
    board
}

#[test]
fn a_pass_that_left_one_object_undone_is_not_enforced() {
    let board = planned();
    let errors = vec![failed().unwrap_err(); 5];
    board.passed("policy", 3, &Ok(Report { operations: 2, errors }));
    let row = &board.observed().reconcilers[0];
    assert_eq!((row.state.as_str(), row.generation, row.operations), ("error", 0, 2));
    assert!(row.error.as_ref().unwrap().ends_with("(and 2 more)"), "{row:?}");
}

fn failed() -> Result<Report, ReconcileError> {
    Err(ReconcileError { object: "route 10.0.0.0/8".into(), message: "EPERM".into() })
}

#[test]
fn a_generation_is_enforced_once_every_reconciler_has_carried_it_out() {
    let board = planned();
    board.passed("policy", 3, &Ok(Report { operations: 2, ..Report::default() }));
    assert_eq!(board.observed().generation(), Generation { snapshot: 3, enforced: 0, policy: 3 });
    board.passed("routes", 3, &failed());
    assert_eq!(board.observed().generation().enforced, 0);
    board.passed("routes", 3, &Ok(Report::default()));
    assert_eq!(board.observed().generation().enforced, 3);
}

#[test]
fn a_failed_reconciler_is_an_issue_until_it_succeeds() {
    let board = planned();
    board.passed("routes", 3, &failed());
    let status = board.status(SystemTime::now());
    assert_eq!(status.issues[0].message, "route 10.0.0.0/8: EPERM");
    assert_eq!(status.reconcilers[1].state, "error");
    board.passed("routes", 3, &Ok(Report::default()));
    assert!(board.status(SystemTime::now()).issues.is_empty());
}

#[test]
fn a_peer_without_a_datapath_is_unknown_and_its_device_absent() {
    let status = planned().status(SystemTime::now());
    assert_eq!(status.devices[0].state, "absent");
    assert_eq!(status.peers[0].state, PeerState::Unknown);
    assert_eq!(status.peers[0].handshake_age_seconds, None);
}

#[test]
fn a_peers_counters_come_from_the_device_and_its_name_from_the_plan() {
    let board = planned();
    let running = mesh_uapi::Peer { rx_bytes: 10, tx_bytes: 20, ..Default::default() };
    let device = Device { peers: [(key(2), running)].into(), listen_port: 51820, ..Device::default() };
    let seen = DeviceSeen { up: Some(true), mtu: 1420, device: Some(device), ..DeviceSeen::default() };
    let states = [(("margay0".to_owned(), key(2)), PeerState::Up)].into();
    board.set_devices([("margay0".to_owned(), seen)].into(), states, Healths::default());
    let status = board.status(SystemTime::now());
    assert_eq!(status.devices[0].state, "up");
    let peer = &status.peers[0];
    assert_eq!((peer.name.as_str(), peer.state, peer.rx_bytes), ("b", PeerState::Up, 10));
}

#[test]
fn issues_are_replaced_by_their_reporter_and_told_once() {
    let board = planned();
    let issue = |word: &str| Issue {
        object: "x".into(),
        field: String::new(),
        reason: word.into(),
        message: word.into(),
    };
    board.set_issues("ipam", vec![issue("A"), issue("B")]);
    board.set_issues("cni", vec![issue("A")]);
    assert_eq!(board.observed().all_issues().len(), 2);
    board.set_issues("ipam", Vec::new());
    assert_eq!(board.observed().all_issues(), vec![issue("A")]);
}
