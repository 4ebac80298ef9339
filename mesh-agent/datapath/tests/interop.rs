//! Tunnels with other makes, as initiator and as responder, over IPv4 and IPv6. Needs root.
#![allow(clippy::unwrap_used)]

mod world;

use world::{Host, Kind, in_world, transfer, tunnel};

const SIZE: usize = 20 << 20;

/// The left side begins; then 20 MB each way and family arrive unchanged.
fn carries_data(left: Kind, right: Kind, endpoint: &str) {
    let tunnel = tunnel(left, right, endpoint);
    Host::Left.reaches("10.9.0.2");
    Host::Right.reaches("fd09::1");
    for (from, to) in [
        (Host::Left, "10.9.0.2"),
        (Host::Right, "10.9.0.1"),
        (Host::Left, "fd09::2"),
        (Host::Right, "fd09::1"),
    ] {
        transfer(from, to.parse().unwrap(), SIZE);
    }
    for side in [&tunnel.left, &tunnel.right] {
        // boringtun tells the age here instead of the time, so 0 at first.
        assert!(side.kind == Kind::Boringtun || side.show("latest-handshakes") != "0");
        let transferred: u64 = side.show("transfer").parse().unwrap();
        assert!(transferred > 2 * SIZE as u64, "{}: {transferred}", side.interface);
    }
}

#[test]
fn ours_with_ours_over_ipv4() {
    in_world(|| carries_data(Kind::Ours, Kind::Ours, "192.0.2.2:PORT"));
}

#[test]
fn ours_with_ours_over_ipv6() {
    in_world(|| carries_data(Kind::Ours, Kind::Ours, "[2001:db8::2]:PORT"));
}

#[test]
fn ours_begins_with_wireguard_go() {
    in_world(|| carries_data(Kind::Ours, Kind::WireguardGo, "192.0.2.2:PORT"));
}

#[test]
fn wireguard_go_begins_with_ours() {
    in_world(|| carries_data(Kind::WireguardGo, Kind::Ours, "[2001:db8::2]:PORT"));
}

#[test]
fn ours_begins_with_boringtun() {
    in_world(|| carries_data(Kind::Ours, Kind::Boringtun, "192.0.2.2:PORT"));
}

#[test]
fn boringtun_begins_with_ours() {
    in_world(|| carries_data(Kind::Boringtun, Kind::Ours, "[2001:db8::2]:PORT"));
}

#[test]
fn preshared_keys_work_with_wireguard_go() {
    in_world(|| {
        let tunnel = tunnel(Kind::Ours, Kind::WireguardGo, "192.0.2.2:PORT");
        let (file, _) = world::new_key("psk");
        tunnel.left.wg(&format!("peer {} preshared-key {file}", tunnel.right.public_key));
        assert!(!Host::Left.pings("10.9.0.2"), "only one side has the preshared key");
        tunnel.right.wg(&format!("peer {} preshared-key {file}", tunnel.left.public_key));
        Host::Left.reaches("10.9.0.2");
    });
}
