//! What is rendered is parsed back, and no text makes a parser panic.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, UNIX_EPOCH};

use ipnet::IpNet;
use keyservice::{PresharedKey, PrivateKey, PublicKey};
use mesh_uapi::codec::{self, Lines, Request};
use mesh_uapi::{CodecError, Device, Offload, Op, Peer, PeerStats, PeerUpdate, Stats};
use proptest::prelude::*;

fn key() -> impl Strategy<Value = PublicKey> {
    any::<[u8; 32]>().prop_map(PublicKey::from_bytes)
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    (address(), 1u16..).prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port))
}

fn prefix() -> impl Strategy<Value = IpNet> {
    (address(), any::<u8>()).prop_map(|(ip, n)| {
        let width = if ip.is_ipv4() { 32 } else { 128 };
        IpNet::new(ip, n % (width + 1)).unwrap().trunc()
    })
}

fn prefixes() -> impl Strategy<Value = BTreeSet<IpNet>> {
    prop::collection::btree_set(prefix(), 0..5)
}

fn peer() -> impl Strategy<Value = Peer> {
    let times = prop::option::of((1u64..1 << 40, 0u32..1_000_000_000));
    let counters = (any::<u16>(), any::<u64>(), any::<u64>());
    (any::<bool>(), prop::option::of(endpoint()), prefixes(), times, counters).prop_map(
        |(has_preshared_key, endpoint, allowed_ips, time, (persistent_keepalive, rx_bytes, tx_bytes))| Peer {
            has_preshared_key,
            endpoint,
            allowed_ips,
            persistent_keepalive,
            last_handshake: time.map(|(s, n)| UNIX_EPOCH + Duration::new(s, n)),
            rx_bytes,
            tx_bytes,
        },
    )
}

prop_compose! {
    fn update()(
        update_only: bool,
        preshared_key in prop::option::of(any::<[u8; 32]>().prop_map(PresharedKey::from_bytes)),
        endpoint in prop::option::of(endpoint()),
        persistent_keepalive: Option<u16>,
        add_allowed_ips in prefixes(),
        remove in prefixes(),
        replace_allowed_ips: bool,
        initiate: bool,
    ) -> PeerUpdate {
        let remove_allowed_ips = &remove - &add_allowed_ips;
        PeerUpdate {
            update_only, preshared_key, endpoint, persistent_keepalive, add_allowed_ips, remove_allowed_ips,
            replace_allowed_ips, initiate,
        }
    }
}

fn counts() -> impl Strategy<Value = BTreeMap<String, u64>> {
    prop::collection::btree_map("[a-z_]{1,20}", any::<u64>(), 0..5)
}

fn peer_stats() -> impl Strategy<Value = PeerStats> {
    let counters = any::<[u64; 4]>();
    (counters, counts()).prop_map(|([rx_packets, tx_packets, handshakes, initiations], drops)| PeerStats {
        rx_packets,
        tx_packets,
        handshakes,
        initiations,
        drops,
    })
}

fn offload() -> impl Strategy<Value = Offload> {
    prop_oneof![
        Just(Offload::On),
        Just(Offload::Off),
        any::<i32>().prop_map(Offload::Refused),
        any::<(u32, i32)>().prop_map(|(bytes, errno)| Offload::Below(bytes, errno)),
        Just(Offload::Other("half 5".into())),
        Just(Offload::Other("refused +5".into())),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        any::<[u8; 32]>().prop_map(|bytes| Op::SetPrivateKey(PrivateKey::from_bytes(&bytes))),
        Just(Op::ClearPrivateKey),
        Just(Op::RemoveAllPeers),
        any::<u16>().prop_map(Op::SetListenPort),
        any::<u32>().prop_map(Op::SetFwmark),
        key().prop_map(Op::RemovePeer),
        (key(), update()).prop_map(|(key, update)| Op::SetPeer(key, update)),
    ]
}

fn parse_set(text: &str) -> Result<Vec<Op>, CodecError> {
    match codec::read_request(&mut Lines::new(text.as_bytes()))? {
        Some(Request::Set(ops)) => Ok(ops),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn a_device_survives_render_and_parse(
        secret in prop::option::of(any::<[u8; 32]>()),
        listen_port: u16,
        fwmark: u32,
        peers in prop::collection::btree_map(key(), peer(), 0..5),
    ) {
        let secret = secret.map(|bytes| PrivateKey::from_bytes(&bytes));
        let device = Device { public_key: secret.as_ref().map(PrivateKey::public), listen_port, fwmark, peers };
        let preshared = |key: &PublicKey| {
            device.peers[key].has_preshared_key.then(|| PresharedKey::from_bytes([7; 32]))
        };
        let text = codec::get::render(&device, secret.as_ref(), preshared);
        let parsed = codec::get::read(&mut Lines::new(text.as_bytes())).unwrap();
        prop_assert_eq!(parsed, device);
    }

    #[test]
    fn operations_survive_render_and_parse_in_order(ops in prop::collection::vec(op(), 1..8)) {
        let requests = codec::set::render_requests(&ops);
        let mut parsed = Vec::new();
        for request in &requests {
            parsed.extend(parse_set(request).unwrap());
        }
        prop_assert_eq!(format!("{parsed:?}"), format!("{ops:?}"));
        let again = codec::set::render_requests(&parsed);
        // Secrets are redacted in Debug, so compare them as text.
        prop_assert!(again.iter().eq(&requests));
    }

    #[test]
    fn stats_survive_render_and_parse(
        mtu: u32,
        words in ("[a-z0-9-]{0,12}", "[a-z0-9-]{0,12}"),
        offloads in prop::collection::btree_map("[a-z_]{1,20}", offload(), 0..5),
        drops in counts(),
        peers in prop::collection::btree_map(key(), peer_stats(), 0..4),
    ) {
        let (core, crypto) = words;
        let stats = Stats { version: "1.2.3".into(), mtu, core, crypto, offloads, drops, peers };
        let text = codec::stats::render(&stats);
        prop_assert_eq!(codec::stats::read(&mut Lines::new(text.as_bytes())).unwrap(), stats);
    }

    #[test]
    fn stats_with_unknown_lines_mean_what_they_mean_without(
        peers in prop::collection::btree_map(key(), peer_stats(), 1..4),
        drops in counts(),
        new in prop::collection::vec("[a-z]{1,8}x9=[^\\n\\x00]{0,40}", 1..6),
        at in prop::collection::vec(any::<prop::sample::Index>(), 6),
    ) {
        let stats = Stats { version: "1".into(), drops, peers, ..Stats::default() };
        let text = codec::stats::render(&stats);
        let mut lines: Vec<&str> = text.trim_end().lines().collect();
        for (line, at) in new.iter().zip(at) {
            lines.insert(at.index(lines.len()), line);
        }
        let text = lines.join("\n") + "\n\n";
        prop_assert_eq!(codec::stats::read(&mut Lines::new(text.as_bytes())).unwrap(), stats);
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = codec::read_request(&mut Lines::new(&bytes[..]));
        let _ = codec::get::read(&mut Lines::new(&bytes[..]));
        let _ = codec::stats::read(&mut Lines::new(&bytes[..]));
    }

    #[test]
    fn near_valid_text_is_parsed_or_refused(
        lines in prop::collection::vec(
            ("(set|get|public_key|private_key|endpoint|allowed_ip|remove|errno|listen_port|x)",
             "(1|true|-?10.0.0.0/8|\\[::1\\]:1|[0-9a-f]{64}|.{0,12})"), 0..12),
    ) {
        let text: String = lines.iter().map(|(k, v)| format!("{k}={v}\n")).collect();
        for text in [format!("set=1\n{text}\n"), format!("{text}\n")] {
            let _ = codec::read_request(&mut Lines::new(text.as_bytes()));
            let _ = codec::get::read(&mut Lines::new(text.as_bytes()));
        }
    }
}

const KEY: &str = "e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a";

#[track_caller]
fn refused(text: &str, why: &str) {
    let error = parse_set(text).unwrap_err();
    assert_eq!(error.to_string(), why);
    assert_eq!(error.errno(), 22);
}

#[test]
fn a_refusal_names_line_and_key() {
    refused("set=1\nlisten_port=65536\n\n", "line 2: listen_port: number too large to fit in target type");
    refused("set=1\nlisten_port=+1\n\n", "line 2: listen_port: not a decimal number");
    refused("set=1\nfwmark=x\n\n", "line 2: fwmark: invalid digit found in string");
    refused("set=1\nprivate_key=abc\n\n", "line 2: private_key: key is 1 bytes long, not 32");
    refused("set=1\nallowed_ip=10.0.0.0/8\n\n", "line 2: allowed_ip: unknown device key");
    let peer = format!("set=1\npublic_key={KEY}\n");
    refused(&format!("{peer}listen_port=1\n\n"), "line 3: listen_port: unknown peer key");
    refused(&format!("{peer}endpoint=host:1\n\n"), "line 3: endpoint: not an address and port");
    refused(&format!("{peer}endpoint=1.2.3.4:0\n\n"), "line 3: endpoint: port 0");
    refused(
        &format!("{peer}allowed_ip=10.0.0.0/33\n\n"),
        "line 3: allowed_ip: not an address with a prefix length",
    );
    refused(&format!("{peer}remove=false\n\n"), "line 3: remove: only true is allowed");
    refused(&format!("{peer}protocol_version=2\n\n"), "line 3: protocol_version: only version 1 exists");
    refused("set=1\nnonsense\n\n", "line 2: not key=value");
    refused("set=2\n\n", "line 1: set: unknown operation");
    refused(&format!("set=1\nfwmark={}\n\n", "1".repeat(300)), "line 2: longer than 256 bytes");
}

#[test]
fn a_refusal_never_repeats_what_may_be_a_secret() {
    let secret = "cGFzc3dvcmRwYXNzd29yZHBhc3N3b3JkcGFzc3dvcmQ=";
    let error = parse_set(&format!("set=1\n{secret}\n\n")).unwrap_err().to_string();
    assert_eq!(error, "line 2: (not a key): unknown device key");
    let error = parse_set(&format!("set=1\nprivate_key={secret}\n\n")).unwrap_err().to_string();
    assert!(!error.contains("cGFz"), "{error}");
}

#[test]
fn a_refused_request_is_skipped_and_the_next_one_answered() {
    let long = "x".repeat(10_000);
    for bad in ["nonsense\nfwmark=1\n\n", "set=1\nfwmark=x\n\n", &format!("set=1\n{long}\nfwmark=2\n\n")] {
        let text = format!("{bad}get=1\n\n");
        let mut lines = Lines::new(text.as_bytes());
        assert!(codec::read_request(&mut lines).is_err());
        assert!(matches!(codec::read_request(&mut lines), Ok(Some(Request::Get))), "after {bad:.20}");
        assert!(matches!(codec::read_request(&mut lines), Ok(None)));
    }
}

#[test]
fn a_request_without_end_is_refused_at_its_limit() {
    let text = "fwmark=1\n".repeat(codec::MAX_LINES + 1);
    refused(&format!("set=1\n{text}\n"), "more than 1048576 lines");
}

#[test]
fn a_request_cut_off_anywhere_changes_nothing() {
    let text = format!("set=1\nlisten_port=1\npublic_key={KEY}\nallowed_ip=10.0.0.0/8\n\n");
    for end in 1..text.len() {
        let result = codec::read_request(&mut Lines::new(&text.as_bytes()[..end]));
        assert!(matches!(result, Err(CodecError::Truncated(_))), "cut at {end}: {result:?}");
    }
}

#[test]
fn stock_lines_mean_what_wg_means() {
    let text = format!(
        "set=1\nreplace_peers=true\nprivate_key={:064}\npublic_key={KEY}\nupdate_only=true\nprotocol_version=1\n\
         replace_allowed_ips=true\nallowed_ip=10.1.2.3/8\nallowed_ip=-10.0.0.0/8\nallowed_ip=+fe80::1\n\
         endpoint=[::ffff:1.2.3.4]:5\npublic_key={KEY}\nremove=true\n\n",
        0
    );
    let ops = parse_set(&text).unwrap();
    let [Op::RemoveAllPeers, Op::ClearPrivateKey, Op::SetPeer(_, update), Op::RemovePeer(_)] = &ops[..]
    else {
        panic!("{ops:?}")
    };
    assert!(update.update_only && update.replace_allowed_ips);
    assert_eq!(update.endpoint, Some("1.2.3.4:5".parse().unwrap()));
    assert_eq!(update.add_allowed_ips, BTreeSet::from(["fe80::1/128".parse().unwrap()]));
    assert_eq!(update.remove_allowed_ips, BTreeSet::from(["10.0.0.0/8".parse().unwrap()]));
}

#[test]
fn get_replies_lose_their_secrets_and_keep_the_rest() {
    let text = format!(
        "private_key={KEY}\nlisten_port=7\nnew_key=1\npublic_key={KEY}\npreshared_key={KEY}\nerrno=0\n\n"
    );
    let device = codec::get::read(&mut Lines::new(text.as_bytes())).unwrap();
    assert_eq!(device.public_key, Some(PrivateKey::from_hex(KEY).unwrap().public()));
    let peer = Peer { has_preshared_key: true, ..Peer::default() };
    assert_eq!(device.peers, BTreeMap::from([(PublicKey::from_hex(KEY).unwrap(), peer)]));
    assert!(!format!("{device:?}").contains(KEY));
}

#[test]
fn an_errno_of_either_sign_is_an_error() {
    for text in ["errno=-22\n\n", "errno=22\n\n"] {
        let error = codec::read_set_reply(&mut Lines::new(text.as_bytes())).unwrap_err();
        assert!(matches!(error, CodecError::Errno(22)), "{error}");
    }
    assert!(codec::read_set_reply(&mut Lines::new(&b"errno=0\n\n"[..])).is_ok());
    assert!(matches!(codec::read_set_reply(&mut Lines::new(&b""[..])), Err(CodecError::Truncated(_))));
}

#[test]
fn what_an_older_datapath_says_is_read() {
    let text =
        format!("version=0.1.0\nmtu=1420\ndrop_replayed=1\npublic_key={KEY}\ndrop_bad_auth=2\nerrno=0\n\n");
    let stats = codec::stats::read(&mut Lines::new(text.as_bytes())).unwrap();
    assert_eq!((stats.mtu, stats.drops["replayed"], stats.core.as_str()), (1420, 1, ""));
    let peer = &stats.peers[&PublicKey::from_hex(KEY).unwrap()];
    assert_eq!((peer.rx_packets, peer.drops["bad_auth"]), (0, 2));
}

#[test]
fn a_device_without_the_extension_is_told_by_its_keepalive() {
    let update = |keepalive| PeerUpdate {
        initiate: true,
        endpoint: Some("192.0.2.1:5".parse().unwrap()),
        persistent_keepalive: keepalive,
        ..PeerUpdate::default()
    };
    let plain = |keepalive| {
        let all = update(keepalive).in_plain_uapi();
        assert!(all.iter().all(|update| !update.initiate));
        assert_eq!(all[0].endpoint, update(None).endpoint);
        all.iter().map(|update| update.persistent_keepalive.unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(plain(Some(25)), [0, 25], "off, and on again");
    assert_eq!(plain(Some(0)), [0, 65535, 0], "it stays off");
    assert_eq!(plain(None), [0, 65535, 0]);
}
