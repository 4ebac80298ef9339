//! Datagrams that nobody should send, on real sockets, and endpoints that move. Needs root.
#![allow(clippy::unwrap_used)]

mod world;

use world::{Host, Kind, Relay, Tunnel, in_world, transfer, tunnel, until};

/// A tunnel whose left side reaches the right one through a relay.
fn relayed(right: Kind) -> (Tunnel, Relay) {
    let relay = Relay::start(Host::Left, "192.0.2.2:51822".parse().unwrap());
    let tunnel = tunnel(Kind::Ours, right, &format!("192.0.2.1:{}", relay.port));
    assert_eq!(tunnel.right.port, 51822);
    Host::Left.reaches("10.9.0.2");
    (tunnel, relay)
}

#[test]
fn replayed_truncated_oversized_and_foreign_datagrams_are_counted_and_harmless() {
    in_world(|| {
        let (tunnel, relay) = relayed(Kind::Ours);
        let right = &tunnel.right;
        let seen = relay.seen();
        let of_type = |kind: u8| seen.iter().rfind(|d| d[0] == kind && d.len() > 32).unwrap().clone();
        let (initiation, data) = (of_type(1), of_type(4));
        let mut index = data.clone();
        index[7] ^= 0xff;
        let mut forged = data.clone();
        forged[8] = 0xee;
        let mut mac = initiation.clone();
        mac[130] ^= 1;
        let cases: [(&str, Vec<u8>); 10] = [
            ("replayed", data.clone()),
            ("stale_handshake", initiation.clone()),
            ("truncated", data[..20].to_vec()),
            ("truncated", Vec::new()),
            ("oversized", [&initiation[..], &[0; 60_000]].concat()),
            ("unknown_type", vec![0x45; 1400]),
            ("unknown_index", index),
            ("bad_auth", forged),
            ("bad_auth", [&data[..9], &[0xee; 65_000]].concat()),
            ("bad_mac", mac),
        ];
        for (reason, datagram) in &cases {
            let before = right.drops(reason);
            relay.send(datagram);
            until(&format!("{reason} is counted"), || right.drops(reason) == before + 1);
        }
        assert!(Host::Left.pings("10.9.0.2"), "the tunnel suffered");
        transfer(Host::Left, "10.9.0.2".parse().unwrap(), 1 << 20);
    });
}

#[test]
fn a_spoofed_inner_source_is_counted_and_dropped() {
    in_world(|| {
        let tunnel = tunnel(Kind::WireguardGo, Kind::Ours, "192.0.2.2:PORT");
        Host::Left.reaches("10.9.0.2");
        // The left side takes another's address, and its own device does not mind.
        Host::Left.run("ip", "addr add 10.9.0.66/24 dev wg-left");
        let before = tunnel.right.drops("spoofed_source");
        assert!(!Host::Left.try_run("ping", "-n -c 3 -i 0.2 -W 1 -I 10.9.0.66 10.9.0.2").status.success());
        assert_eq!(tunnel.right.drops("spoofed_source"), before + 3);
        assert!(Host::Left.pings("10.9.0.2"));
    });
}

#[test]
fn an_endpoint_that_moves_is_followed_and_a_forged_one_is_not() {
    in_world(|| {
        let (tunnel, relay) = relayed(Kind::Ours);
        let data = relay.seen().into_iter().rfind(|d| d[0] == 4 && d.len() > 32).unwrap();
        let before = tunnel.right.show("endpoints");
        let moved = format!("192.0.2.1:{}", relay.rebind());
        assert_ne!(before, moved);
        // From the new place come a replay and a forgery first.
        let count = tunnel.right.drops("replayed");
        relay.send(&data);
        until("the replay is counted", || tunnel.right.drops("replayed") == count + 1);
        let mut forged = data;
        forged[8] = 0xee;
        relay.send(&forged);
        until("the forgery is counted", || tunnel.right.drops("bad_auth") == 1);
        assert_eq!(tunnel.right.show("endpoints"), before);
        assert!(Host::Left.pings("10.9.0.2"));
        assert_eq!(tunnel.right.show("endpoints"), moved);
        assert!(Host::Right.pings("10.9.0.1"), "and used at once");
    });
}

#[test]
fn an_endpoint_that_cannot_be_sent_to_ends_nothing() {
    in_world(|| {
        let tunnel = tunnel(Kind::Ours, Kind::Ours, "192.0.2.2:PORT");
        Host::Left.reaches("10.9.0.2");
        let (_, lost) = world::new_key("lost");
        tunnel.left.wg(&format!("peer {lost} allowed-ips 10.9.0.99/32 endpoint [2001:db8:ffff::1]:9"));
        assert!(!Host::Left.pings("10.9.0.99"));
        assert!(tunnel.left.drops("send_failed") > 0);
        assert!(Host::Left.pings("10.9.0.2"));
    });
}

#[test]
fn packets_larger_than_the_wire_are_cut_and_joined_again() {
    in_world(|| {
        let _tunnel = tunnel(Kind::Ours, Kind::Ours, "192.0.2.2:PORT");
        for host in [Host::Left, Host::Right] {
            host.run("ip", &format!("link set wg-{} mtu 9000", host.name()));
        }
        Host::Left.reaches("10.9.0.2");
        for size in [1392, 1473, 8972] {
            let ping = Host::Left.try_run("ping", &format!("-n -c 1 -W 2 -M do -s {size} 10.9.0.2"));
            assert!(ping.status.success(), "{size}: {ping:?}");
        }
        transfer(Host::Left, "10.9.0.2".parse().unwrap(), 1 << 20);
    });
}

#[test]
fn a_link_that_is_down_costs_packets_and_not_the_device() {
    in_world(|| {
        let tunnel = tunnel(Kind::Ours, Kind::Ours, "192.0.2.2:PORT");
        Host::Left.reaches("10.9.0.2");
        Host::Right.run("ip", "link set wg-right down");
        assert!(!Host::Left.pings("10.9.0.2"));
        assert!(tunnel.right.drops("tun_write_failed") > 0);
        Host::Right.run("ip", "link set wg-right up");
        Host::Right.run("ip", "addr replace 10.9.0.2/24 dev wg-right");
        Host::Left.reaches("10.9.0.2");
    });
}
