//! The device without I/O: each trap that the protocol core leaves to its caller, by name.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use keyservice::{PresharedKey, PublicKey};
use mesh_datapath::counters::Drop;
use mesh_datapath::gate::TOTAL_RATE;
use mesh_datapath::limiter::{BURST, RATE};
use mesh_datapath::peer::MAX_STAGED;
use mesh_uapi::{Op, PeerUpdate};
use support::*;

#[test]
fn packets_get_through_both_ways_and_in_both_families() {
    let (a, b) = pair();
    a.befriend(&b, &["fd00::2/128"]);
    b.befriend(&a, &["fd00::1/128"]);
    for length in [40, 41, 84, 1000, 1419, 1420, 9000] {
        for (from, to) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let (there, back) = (packet(from, to, length), packet(to, from, length));
            assert_eq!(run(&[&a, &b], a.send(now(), &there)), [there]);
            assert_eq!(run(&[&a, &b], b.send(now(), &back)), [back]);
        }
    }
    assert!(a.view_of(&b).last_handshake.is_some() && b.view_of(&a).last_handshake.is_some());
}

#[test]
fn both_sides_beginning_at_once_end_with_a_tunnel() {
    let (a, b) = pair();
    let mut wire = a.send(now(), &packet("10.0.0.1", "10.0.0.2", 50));
    wire.extend(b.send(now(), &packet("10.0.0.2", "10.0.0.1", 60)));
    assert_eq!(run(&[&a, &b], wire).len(), 2);
}

#[test]
fn data_is_padded_to_16_bytes_but_not_beyond_the_mtu() {
    let (a, b) = connected();
    for (length, sealed) in [(33, 48), (48, 48), (1409, 1420), (1420, 1420), (1430, 1430)] {
        let wire = a.send(now(), &packet("10.0.0.1", "10.0.0.2", length));
        assert_eq!(wire[0].1.len(), sealed + 32, "packet of {length}");
        assert_eq!(run(&[&a, &b], wire)[0].len(), length, "the far side trims it");
    }
}

#[test]
fn padding_bytes_are_zero_and_leak_nothing_of_the_buffer() {
    let a = node(1);
    let own = key(9);
    let mut peer = bare(&own, &a.public());
    let add_allowed_ips = ["10.0.0.9/32".parse().unwrap()].into();
    a.apply(&[Op::SetPeer(own.public(), PeerUpdate { add_allowed_ips, ..Default::default() })]);
    join(&mut peer, &a, ([192, 0, 2, 9], 9).into());
    let mut buffer = [0xff; 256];
    let wire = a.send(now(), &packet("10.0.0.1", "10.0.0.9", 33));
    assert_eq!(wire[0].1.len(), 48 + 32);
    match peer.decapsulate(None, &wire[0].1, &mut buffer) {
        boringtun::noise::TunnResult::WriteToTunnelV4(packet, _) => assert_eq!(packet.len(), 33),
        other => panic!("{other:?}"),
    }
    assert_eq!(buffer[33..48], [0; 15]);
}

#[test]
fn a_replayed_datagram_is_counted_and_harmless() {
    let (a, b) = connected();
    let wire = a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84));
    assert_eq!(b.receive(now(), a.at, &wire[0].1).1.len(), 1);
    assert_eq!(b.receive(now(), a.at, &wire[0].1).1.len(), 0);
    assert_eq!(b.drops(Drop::Replayed), 1);
    assert_eq!(b.device.stats().peers[&a.public()].drops["replayed"], 1);
}

#[test]
fn the_replay_window_takes_8192_reordered_packets_and_counts_older_ones() {
    let (a, b) = connected();
    let mut wire: Vec<_> =
        (0..9000).flat_map(|_| a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))).collect();
    wire.reverse();
    let received = run(&[&a, &b], wire[..8192].to_vec());
    assert_eq!(received.len(), 8192);
    assert!(run(&[&a, &b], wire[8192..].to_vec()).is_empty());
    assert_eq!(b.drops(Drop::Replayed), 808);
}

#[test]
fn a_counter_at_the_end_of_its_range_is_refused_before_the_core_adds_to_it() {
    let (a, b) = connected();
    let mut wire = a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84));
    for counter in [u64::MAX, u64::MAX - (1 << 13)] {
        wire[0].1[8..16].copy_from_slice(&counter.to_le_bytes());
        b.receive(now(), a.at, &wire[0].1);
    }
    assert_eq!(b.drops(Drop::CounterExhausted), 2);
}

#[test]
fn sender_indices_say_nothing_about_the_number_of_peers() {
    let a = node(1);
    let mut seen = std::collections::BTreeSet::new();
    for seed in 10..110 {
        let peer = node(seed);
        a.befriend(&peer, &[&format!("10.0.0.{seed}/32")]);
        let wire = a.send(now(), &packet("10.0.0.1", &format!("10.0.0.{seed}"), 84));
        seen.insert(u32::from_le_bytes(wire[0].1[4..8].try_into().unwrap()) >> 8);
    }
    assert_eq!(seen.len(), 100);
    assert!(seen.iter().any(|index| *index > 1 << 20), "indices are small numbers: {seen:?}");
}

#[test]
fn a_peer_cannot_send_from_a_longer_prefix_of_another() {
    let (a, b) = connected();
    let c = node(3);
    b.befriend(&a, &["10.0.0.0/8"]);
    b.befriend(&c, &["10.1.0.0/16"]);
    a.befriend(&b, &["0.0.0.0/0"]);
    let honest = a.send(now(), &packet("10.9.9.9", "10.0.0.2", 84));
    assert_eq!(run(&[&a, &b], honest).len(), 1);
    for source in ["10.1.0.1", "11.0.0.1"] {
        let spoofed = a.send(now(), &packet(source, "10.0.0.2", 84));
        assert!(run(&[&a, &b], spoofed).is_empty(), "{source}");
    }
    assert_eq!(b.drops(Drop::SpoofedSource), 2);
    assert_eq!(b.device.stats().peers[&a.public()].drops["spoofed_source"], 2);
}

#[test]
fn only_an_authenticated_packet_moves_the_endpoint() {
    let (a, b) = connected();
    let elsewhere = ([198, 51, 100, 1], 999).into();
    let good = a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84)).remove(0).1;
    let mut tampered = good.clone();
    *tampered.last_mut().unwrap() ^= 1;
    b.receive(now(), elsewhere, &tampered);
    assert_eq!(b.drops(Drop::BadAuth), 1);
    assert_eq!(b.endpoint_of(&a), Some(a.at), "a forged packet moved it");
    b.receive(now(), elsewhere, &good);
    assert_eq!(b.endpoint_of(&a), Some(elsewhere));
    b.receive(now(), a.at, &good);
    assert_eq!(b.endpoint_of(&a), Some(elsewhere), "a replay moved it");
}

#[test]
fn an_initiation_is_answered_where_it_came_from_and_moves_nothing_until_confirmed() {
    let (a, b) = connected();
    let elsewhere = ([198, 51, 100, 1], 999).into();
    let mut again = bare(&a.key, &b.public());
    let soon = later(now(), Duration::from_secs(1));
    let (response, _) = b.receive(soon, elsewhere, &initiation(&mut again));
    assert_eq!(response[0].0, elsewhere);
    assert_eq!(b.endpoint_of(&a), Some(a.at));
    b.receive(soon, elsewhere, &answer(&mut again, &response[0].1).unwrap());
    assert_eq!(b.endpoint_of(&a), Some(elsewhere));
}

#[test]
fn a_replayed_initiation_is_counted() {
    let (a, b) = pair();
    let mut peer = bare(&a.key, &b.public());
    let first = initiation(&mut peer);
    let elsewhere = ([198, 51, 100, 1], 999).into();
    assert_eq!(b.receive(now(), a.at, &first).0.len(), 1);
    assert!(b.receive(now(), elsewhere, &first).0.is_empty());
    assert_eq!(b.drops(Drop::StaleHandshake), 1);
    assert_eq!(b.endpoint_of(&a), Some(a.at));
}

/// Uses up the burst of `from` with handshakes that know the public key but are no peer's.
fn flood(target: &Node, from: std::net::SocketAddr, count: u32) {
    let mut stranger = bare(&key(200), &target.public());
    for _ in 0..count {
        target.receive(now(), from, &initiation(&mut stranger));
    }
}

#[test]
fn one_flooder_puts_no_other_source_under_cookies() {
    let (a, b) = pair();
    // More than all together may send in a second.
    let count = 4 * TOTAL_RATE;
    let start = now();
    flood(&b, ([198, 51, 100, 1], 1).into(), count);
    let passed = BURST + RATE * (start.instant.elapsed().as_secs() as u32 + 1);
    assert!(b.drops(Drop::CookieDemanded) >= u64::from(count - passed));
    assert_eq!(run(&[&a, &b], a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))).len(), 1);
    assert!(b.view_of(&a).last_handshake.is_some());
}

#[test]
fn a_source_over_its_limit_gets_in_with_a_cookie_which_fits_its_port_only() {
    let (a, b) = pair();
    flood(&b, a.at, BURST + 20);
    let mut peer = bare(&a.key, &b.public());
    let (cookie, _) = b.receive(now(), a.at, &initiation(&mut peer));
    assert_eq!((cookie[0].0, cookie[0].1[0], cookie[0].1.len()), (a.at, 3, 64));
    assert!(answer(&mut peer, &cookie[0].1).is_none());
    let with_cookie = initiation(&mut peer);
    let mut other_port = a.at;
    other_port.set_port(4242);
    let (refused, _) = b.receive(now(), other_port, &with_cookie);
    assert_eq!(refused[0].1[0], 3, "the cookie of another port was taken");
    let (response, _) = b.receive(now(), a.at, &with_cookie);
    assert_eq!(response[0].1[0], 2, "a valid cookie was refused");
}

#[test]
fn a_cookie_reply_does_not_move_the_endpoint() {
    let (a, b) = pair();
    flood(&b, a.at, BURST + 20);
    let wire = a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84));
    let (cookie, _) = b.receive(now(), a.at, &wire[0].1);
    assert_eq!(cookie[0].1[0], 3);
    a.receive(now(), ([198, 51, 100, 1], 999).into(), &cookie[0].1);
    assert_eq!(a.drops(Drop::Unexpected) + a.drops(Drop::BadAuth), 0, "the cookie was not taken");
    assert_eq!(a.endpoint_of(&b), Some(b.at));
}

#[test]
fn messages_without_a_valid_mac1_use_up_no_limit() {
    let (a, b) = pair();
    let mut wrong = bare(&a.key, &PublicKey::from_bytes([3; 32]));
    for _ in 0..500 {
        b.receive(now(), a.at, &initiation(&mut wrong));
    }
    assert_eq!(b.drops(Drop::BadMac), 500);
    assert_eq!(run(&[&a, &b], a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))).len(), 1);
    assert_eq!(b.drops(Drop::CookieDemanded), 0);
}

#[test]
fn retries_of_peers_that_began_together_are_spread_by_jitter() {
    let a = node(1);
    let start = now();
    for seed in 10..50 {
        a.befriend(&node(seed), &[&format!("10.0.0.{seed}/32")]);
        assert_eq!(a.send(start, &packet("10.0.0.1", &format!("10.0.0.{seed}"), 84)).len(), 1);
    }
    let mut retries = Vec::new();
    for ms in (0..8000).step_by(10) {
        let since = Duration::from_millis(ms);
        for (_, datagram) in a.tick(later(start, since)) {
            assert_eq!(datagram[0], 1);
            retries.push(since);
        }
    }
    assert_eq!(retries.len(), 40);
    let (first, last) = (retries[0], retries[39]);
    assert!(first >= Duration::from_millis(4950), "{first:?}");
    assert!(last <= Duration::from_millis(5333 + 10), "{last:?}");
    assert!(last - first > Duration::from_millis(150), "all within {:?}", last - first);
}

#[test]
fn an_idle_tunnel_with_keepalives_is_renewed_by_its_initiator_at_120_seconds() {
    let (a, b) = connected();
    for (me, peer) in [(&a, &b), (&b, &a)] {
        me.update(peer, PeerUpdate { persistent_keepalive: Some(25), ..Default::default() });
        let wire = me.tick(now());
        assert_eq!(
            wire.iter().filter(|(_, d)| d[0] == 4 && d.len() == 32).count(),
            1,
            "sent when switched on"
        );
        run(&[&a, &b], wire);
    }
    let start = now();
    for seconds in [26, 52, 78, 104] {
        let wire = a.tick(later(start, Duration::from_secs(seconds)));
        assert!(wire.iter().all(|(_, d)| d[0] == 4) && wire.len() == 1, "{seconds}: {wire:?}");
    }
    let at = later(start, Duration::from_secs(130));
    assert!(a.tick(at).iter().any(|(_, d)| d[0] == 1), "the initiator renews");
    assert!(b.tick(at).iter().all(|(_, d)| d[0] == 4), "the responder does not");
}

#[test]
fn a_persistent_keepalive_waits_for_as_long_as_there_is_traffic() {
    let (a, b) = connected();
    a.update(&b, PeerUpdate { persistent_keepalive: Some(25), ..Default::default() });
    a.tick(now());
    let start = now();
    for seconds in [20, 40, 60] {
        let at = later(start, Duration::from_secs(seconds));
        assert!(a.tick(at).is_empty(), "{seconds}");
        let wire = a.send(at, &packet("10.0.0.1", "10.0.0.2", 84));
        b.receive(at, a.at, &wire[0].1);
        let answer = b.send(at, &packet("10.0.0.2", "10.0.0.1", 84));
        a.receive(at, b.at, &answer[0].1);
        a.tick(later(at, Duration::from_secs(11)));
    }
    // The answer at 60 was owed a keepalive, at 71.
    assert!(a.tick(later(start, Duration::from_secs(95))).is_empty());
    assert_eq!(a.tick(later(start, Duration::from_secs(97))).len(), 1);
}

#[test]
fn a_keepalive_brings_a_tunnel_up_that_never_was() {
    let (a, b) = pair();
    a.update(&b, PeerUpdate { persistent_keepalive: Some(25), ..Default::default() });
    run(&[&a, &b], a.tick(now()));
    assert!(a.view_of(&b).last_handshake.is_some() && b.view_of(&a).last_handshake.is_some());
}

#[test]
fn packets_that_wait_for_a_handshake_are_bounded_and_then_sent_in_order() {
    let (a, b) = pair();
    let mut wire = Vec::new();
    for n in 0..MAX_STAGED + 10 {
        wire.extend(a.send(now(), &packet("10.0.0.1", "10.0.0.2", 40 + n)));
    }
    assert_eq!(a.drops(Drop::QueueFull), 10);
    let lengths: Vec<_> = run(&[&a, &b], wire).iter().map(Vec::len).collect();
    assert_eq!(lengths, (50..50 + MAX_STAGED).collect::<Vec<_>>(), "the oldest go first");
}

#[test]
fn datagrams_of_no_use_are_counted_by_reason_and_leave_the_tunnel_alone() {
    let (a, b) = connected();
    let good = a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84)).remove(0).1;
    let mut unknown_index = good.clone();
    unknown_index[7] ^= 0xff;
    let mut reserved = good.clone();
    reserved[1] = 1;
    let mut peer = bare(&key(99), &b.public());
    let stranger = initiation(&mut peer);
    let mut long = stranger.clone();
    long.push(0);
    let huge = [&good[..16], &[0; 65_000][..]].concat();
    let cases: [(&[u8], Drop); 11] = [
        (b"", Drop::Truncated),
        (&[4], Drop::Truncated),
        (&good[..31], Drop::Truncated),
        (&stranger[..147], Drop::Truncated),
        (&long, Drop::Oversized),
        (&[9; 100], Drop::UnknownType),
        (&reserved, Drop::UnknownType),
        (&unknown_index, Drop::UnknownIndex),
        (&stranger, Drop::UnknownPeer),
        (&good[..good.len() - 1], Drop::BadAuth),
        (&huge, Drop::BadAuth),
    ];
    for (datagram, reason) in cases {
        let before = b.drops(reason);
        let (answers, packets) = b.receive(now(), a.at, datagram);
        assert!(answers.is_empty() && packets.is_empty());
        assert_eq!(b.drops(reason), before + 1, "{reason:?}");
    }
    assert_eq!(b.receive(now(), a.at, &good).1.len(), 1, "the tunnel still works");
}

#[test]
fn authenticated_bytes_that_are_no_packet_are_counted() {
    let (a, b) = pair();
    let mut peer = bare(&a.key, &b.public());
    join(&mut peer, &b, a.at);
    let mut short = packet("10.0.0.1", "10.0.0.2", 60);
    short[3] = 10;
    let mut long = packet("10.0.0.1", "10.0.0.2", 60);
    long[3] = 61;
    for inner in [&b"x"[..], &[0x45; 19], &[0x60; 39], &[0; 60], &short, &long] {
        assert!(b.receive(now(), a.at, &sealed(&mut peer, inner)).1.is_empty(), "{inner:?}");
    }
    assert_eq!(b.drops(Drop::BadInner), 6);
    let good = packet("10.0.0.1", "10.0.0.2", 60);
    assert_eq!(b.receive(now(), a.at, &sealed(&mut peer, &good)).1, [good]);
}

#[test]
fn packets_that_cannot_leave_are_counted_by_reason() {
    let (a, b) = pair();
    let c = node(3);
    let add_allowed_ips = ["10.0.0.3/32".parse().unwrap()].into();
    a.update(&c, PeerUpdate { add_allowed_ips, ..Default::default() });
    let cases = [
        (packet("10.0.0.1", "10.7.0.1", 84), Drop::NoPeer),
        (packet("10.0.0.1", "10.0.0.3", 84), Drop::NoEndpoint),
        (packet("10.0.0.1", "10.0.0.2", 65_500), Drop::Oversized),
        (vec![0x45; 10], Drop::BadPacket),
        (vec![], Drop::BadPacket),
    ];
    for (packet, reason) in cases {
        let before = a.drops(reason);
        assert!(a.send(now(), &packet).is_empty());
        assert_eq!(a.drops(reason), before + 1, "{reason:?}");
    }
    a.apply(&[Op::ClearPrivateKey]);
    assert!(a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84)).is_empty());
    assert_eq!(a.drops(Drop::NoKey), 1);
    assert!(run(&[&a, &b], b.send(now(), &packet("10.0.0.2", "10.0.0.1", 84))).is_empty());
}

#[test]
fn a_new_private_key_ends_the_old_sessions_and_makes_new_ones() {
    let (mut a, b) = connected();
    let old = a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84));
    let new = key(77);
    b.apply(&[Op::RemovePeer(a.public())]);
    a.key = new.clone();
    a.apply(&[Op::SetPrivateKey(new.clone())]);
    b.befriend(&a, &["10.0.0.1/32"]);
    // It is of no use but to make the other side begin.
    assert!(run(&[&a, &b], old).is_empty());
    let again = a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84));
    assert_eq!(run(&[&a, &b], again).len(), 1);
    let before = a.view_of(&b);
    a.apply(&[Op::SetPrivateKey(new)]);
    assert_eq!(a.view_of(&b), before, "the same key again changes nothing");
    assert_eq!(a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))[0].1[0], 4);
}

#[test]
fn preshared_keys_must_agree() {
    let (a, b) = pair();
    let with =
        |byte| PeerUpdate { preshared_key: Some(PresharedKey::from_bytes([byte; 32])), ..Default::default() };
    a.update(&b, with(5));
    assert!(run(&[&a, &b], a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))).is_empty());
    b.update(&a, with(5));
    a.update(&b, with(0));
    a.update(&b, with(5));
    assert!(a.view_of(&b).has_preshared_key);
    // Two handshakes of a peer at once are one too many.
    std::thread::sleep(mesh_noise::handshake::MIN_INTERVAL);
    // One packet waited since the first try.
    assert_eq!(run(&[&a, &b], a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))).len(), 2);
    a.update(&b, with(5));
    assert_eq!(a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))[0].1[0], 4, "the same key changes nothing");
}

#[test]
fn a_prefix_moves_to_the_peer_that_was_given_it_last() {
    let (a, b) = connected();
    let c = node(3);
    a.befriend(&c, &["10.0.0.2/32"]);
    assert!(a.view_of(&b).allowed_ips.is_empty());
    assert_eq!(a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))[0].0, c.at);
    // Taking it from the one that lost it does not take it from the new owner.
    let remove_allowed_ips: std::collections::BTreeSet<_> = ["10.0.0.2/32".parse().unwrap()].into();
    a.update(&b, PeerUpdate { remove_allowed_ips: remove_allowed_ips.clone(), ..Default::default() });
    a.apply(&[Op::RemovePeer(b.public())]);
    assert_eq!(a.view_of(&c).allowed_ips, remove_allowed_ips);
    a.update(&c, PeerUpdate { replace_allowed_ips: true, ..Default::default() });
    assert!(a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84)).is_empty());
    assert_eq!(a.drops(Drop::NoPeer), 1);
}

#[test]
fn update_only_and_a_peer_of_ones_own_key_add_nothing() {
    let (a, b) = pair();
    a.apply(&[Op::RemovePeer(b.public())]);
    a.update(&b, PeerUpdate { update_only: true, persistent_keepalive: Some(1), ..Default::default() });
    a.update(&a, PeerUpdate::default());
    assert!(a.device.view().0.peers.is_empty());
    a.befriend(&b, &[]);
    a.apply(&[Op::SetPrivateKey(b.key.clone())]);
    assert!(a.device.view().0.peers.is_empty(), "a device became its own peer");
}

#[test]
fn a_low_order_key_is_refused_and_nothing_else_of_the_request_applied() {
    let a = node(1);
    let bad = Op::SetPeer(PublicKey::from_bytes([0; 32]), PeerUpdate::default());
    let result = a.device.apply(&[Op::SetPeer(key(5).public(), PeerUpdate::default()), bad]);
    assert!(result.unwrap_err().to_string().contains("low order"));
    assert!(a.device.view().0.peers.is_empty());
}

#[test]
fn a_removed_peer_is_gone_for_its_datagrams_too() {
    let (a, b) = connected();
    let wire = a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84));
    b.apply(&[Op::RemoveAllPeers]);
    assert!(run(&[&a, &b], wire).is_empty());
    assert_eq!(b.drops(Drop::UnknownIndex), 1);
}

#[test]
fn a_new_preshared_key_leaves_the_session_alone() {
    let (a, b) = connected();
    for (me, peer) in [(&a, &b), (&b, &a)] {
        let preshared_key = Some(PresharedKey::from_bytes([9; 32]));
        me.update(peer, PeerUpdate { preshared_key, ..Default::default() });
        let wire = me.send(
            now(),
            &packet(
                if me.at == a.at { "10.0.0.1" } else { "10.0.0.2" },
                if me.at == a.at { "10.0.0.2" } else { "10.0.0.1" },
                84,
            ),
        );
        assert_eq!(wire[0].1[0], 4);
        assert_eq!(run(&[&a, &b], wire).len(), 1);
    }
}

#[test]
fn a_side_that_lost_its_sessions_is_back_with_the_first_packet_of_the_other() {
    let (a, b) = connected();
    // A new process on the same host, with the same configuration.
    let restarted = Node { device: mesh_datapath::Device::default(), key: b.key.clone(), at: b.at };
    restarted.apply(&[Op::SetPrivateKey(b.key.clone())]);
    restarted.befriend(&a, &["10.0.0.1/32"]);
    let soon = later(now(), Duration::from_secs(1));
    let lost = a.send(soon, &packet("10.0.0.1", "10.0.0.2", 84));
    let (wire, packets) = restarted.receive(soon, a.at, &lost[0].1);
    assert!(packets.is_empty());
    assert_eq!((wire.len(), wire[0].1[0]), (1, 1), "it begins a handshake");
    let (response, _) = a.receive(soon, b.at, &wire[0].1);
    let (keepalive, _) = restarted.receive(soon, a.at, &response[0].1);
    a.receive(soon, b.at, &keepalive[0].1);
    let again = a.send(soon, &packet("10.0.0.1", "10.0.0.2", 84));
    assert_eq!(restarted.receive(soon, a.at, &again[0].1).1.len(), 1);
    // Others who send such packets gain nothing, and the peer itself no more than one handshake.
    let elsewhere = ([198, 51, 100, 1], 999).into();
    assert!(restarted.receive(soon, elsewhere, &lost[0].1).0.is_empty());
    assert!(restarted.receive(soon, a.at, &lost[0].1).0.is_empty());
}

#[test]
fn a_loud_peer_of_a_lost_session_keeps_no_other_from_coming_back() {
    let restarted = node(1);
    let peers: Vec<Node> = (2..102).map(node).collect();
    for peer in &peers {
        restarted.befriend(peer, &[]);
    }
    // Data of sessions that are gone.
    let stray = [&[4, 0, 0, 0][..], &[7; 28]].concat();
    let at = now();
    let begun = |from: &Node| restarted.receive(at, from.at, &stray).0.len();
    let of_the_loud: usize = (0..1000).map(|_| begun(&peers[0])).sum();
    assert_eq!(of_the_loud, 1);
    assert!(peers.iter().skip(1).all(|peer| begun(peer) == 1));
    assert_eq!(restarted.drops(Drop::UnknownIndex), 1099);
}

#[test]
fn packets_of_the_session_before_are_still_taken() {
    let (a, b) = connected();
    let late: Vec<_> = (0..3).flat_map(|_| a.send(now(), &packet("10.0.0.1", "10.0.0.2", 84))).collect();
    let at = later(now(), Duration::from_secs(121));
    let mut wire = a.send(at, &packet("10.0.0.1", "10.0.0.2", 84));
    wire.extend(a.tick(at));
    assert!(wire.iter().any(|(_, d)| d[0] == 1), "the session is renewed");
    let mut delivered = 0;
    let mut quiet = wire;
    while let Some((to, datagram)) = quiet.pop() {
        let (node, from) = if to == b.at { (&b, a.at) } else { (&a, b.at) };
        let (answers, packets) = node.receive(at, from, &datagram);
        delivered += packets.len();
        quiet.extend(answers);
    }
    assert_eq!(delivered, 1);
    for (_, datagram) in late {
        assert_eq!(b.receive(at, a.at, &datagram).1.len(), 1);
    }
}

#[test]
fn a_handshake_on_demand_replaces_a_live_session_and_is_counted() {
    let (a, b) = connected();
    let before = a.device.stats().peers[&b.public()].clone();
    assert!(before.rx_packets > 0 && before.tx_packets > 0, "{before:?}");
    a.update(&b, PeerUpdate { initiate: true, ..Default::default() });
    let soon = later(now(), Duration::from_millis(250));
    let wire = a.tick(soon);
    assert_eq!((wire.len(), wire[0].1[0]), (1, 1), "at once, in spite of the session");
    let (response, _) = b.receive(soon, a.at, &wire[0].1);
    // The old session serves in between.
    let data = a.send(soon, &packet("10.0.0.1", "10.0.0.2", 84));
    assert_eq!((data[0].1[0], b.receive(soon, a.at, &data[0].1).1.len()), (4, 1));
    a.receive(soon, b.at, &response[0].1);
    let after = a.device.stats().peers[&b.public()].clone();
    assert_eq!(after.handshakes, before.handshakes + 1);
    assert_eq!(after.initiations, before.initiations + 1);
    assert!(a.tick(later(soon, Duration::from_millis(250))).is_empty(), "once");
}
