//! Data through the tunnel with each offload on and off, and a device that changes hands between them. Needs root.
#![allow(clippy::unwrap_used)]

mod world;

use mesh_uapi::Offload;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::mpsc;

use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use world::{DEADLINE, Host, Kind, Side, answers, in_world, transfer, tunnel};

const SIZE: usize = 20 << 20;
const EACH_WAY: [(Host, &str); 4] =
    [(Host::Left, "10.9.0.2"), (Host::Right, "10.9.0.1"), (Host::Left, "fd09::2"), (Host::Right, "fd09::1")];

fn has_vnet_header(side: &Side) -> bool {
    side.host.run("ip", &format!("-d link show {}", side.interface)).contains("vnet_hdr on")
}

/// Datagrams that the sender's kernel gets as large packets; each arrives, whole and in order.
fn datagrams(from: Host, to: IpAddr) {
    const SEGMENT: usize = 1000;
    const ROUNDS: usize = 50;
    let payload = |round: usize| -> Vec<u8> { (0..20_500).map(|n| ((n / 3) ^ round) as u8).collect() };
    let (ready, port) = mpsc::channel();
    let (done, received) = mpsc::channel();
    let receiver = from.other().on_thread(move || {
        let socket = UdpSocket::bind(SocketAddr::new(to, 0)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        ready.send(socket.local_addr().unwrap().port()).unwrap();
        let mut buffer = [0; 2000];
        for round in 0..ROUNDS {
            for expected in payload(round).chunks(SEGMENT) {
                let length = socket.recv(&mut buffer).unwrap();
                assert!(&buffer[..length] == expected, "a datagram of round {round} differs");
            }
            done.send(()).unwrap();
        }
    });
    let to = SocketAddr::new(to, port.recv_timeout(DEADLINE).unwrap());
    let sender = from.on_thread(move || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(to).unwrap();
        setsockopt(&socket, UdpGsoSegment, &(SEGMENT as i32)).unwrap();
        for round in 0..ROUNDS {
            socket.send(&payload(round)).unwrap();
            received.recv_timeout(DEADLINE).unwrap();
        }
    });
    sender.join().unwrap();
    receiver.join().unwrap();
}

/// 20 MB and datagrams each way in both families arrive unchanged, in as many packets as the offloads say.
fn carries_data(left: &'static str, right: &'static str) {
    let tunnel = tunnel(Kind::Offload(left), Kind::Offload(right), "192.0.2.2:PORT");
    Host::Left.reaches("10.9.0.2");
    for (side, offload) in [(&tunnel.left, left), (&tunnel.right, right)] {
        assert_eq!(has_vnet_header(side), matches!(offload, "on" | "tun"), "{offload}");
    }
    for (from, to) in EACH_WAY {
        let [sender, receiver] = match from {
            Host::Left => [(&tunnel.left, left), (&tunnel.right, right)],
            Host::Right => [(&tunnel.right, right), (&tunnel.left, left)],
        };
        let before = [sender.0.packets()[0], receiver.0.packets()[1]];
        transfer(from, to.parse().unwrap(), SIZE);
        let after = [sender.0.packets()[0], receiver.0.packets()[1]];
        let small = (SIZE / 1420) as u64;
        for (n, (_, offload)) in [sender, receiver].into_iter().enumerate() {
            let count = after[n] - before[n];
            match offload {
                "on" => assert!(count < small / 2, "{from:?} {to} {offload}: {count} packets, {n}"),
                "tun" if n == 0 => assert!(count < small / 2, "{from:?} {to} {offload}: {count} packets"),
                "off" | "udp" => assert!(count >= small, "{from:?} {to} {offload}: {count} packets"),
                // Joins what arrives together, which depends on how fast.
                _ => {}
            }
        }
        datagrams(from, to.parse().unwrap());
    }
    for side in [&tunnel.left, &tunnel.right] {
        assert_eq!((side.drops("bad_packet"), side.drops("bad_inner")), (0, 0));
    }
}

#[test]
fn data_arrives_with_all_offloads_on() {
    in_world(|| carries_data("on", "on"));
}

#[test]
fn data_arrives_with_all_offloads_off() {
    in_world(|| carries_data("off", "off"));
}

#[test]
fn data_arrives_with_large_packets_on_the_tun_only() {
    in_world(|| carries_data("tun", "tun"));
}

#[test]
fn data_arrives_with_many_datagrams_at_once_only() {
    in_world(|| carries_data("udp", "udp"));
}

#[test]
fn data_arrives_between_one_with_offloads_and_one_without() {
    in_world(|| carries_data("on", "off"));
}

/// `get=stats` says which offloads are in use. This kernel has all of them.
fn told(side: &Side, offload: &str) {
    let stats = mesh_uapi::Client::new(mesh_uapi::client::socket_path(&side.interface)).stats().unwrap();
    for (name, state) in stats.offloads {
        let on = offload == "on" || name.starts_with(offload);
        assert_eq!(state, if on { Offload::On } else { Offload::Off }, "{name} with {offload}");
    }
}

#[test]
fn an_interface_left_by_one_with_offloads_serves_one_without_and_the_other_way_round() {
    in_world(|| {
        let mut tunnel = tunnel(Kind::Offload("on"), Kind::Offload("off"), "192.0.2.2:PORT");
        Host::Left.reaches("10.9.0.2");
        for (left, right) in [("off", "on"), ("on", "off"), ("udp", "tun")] {
            for (side, offload) in [(&mut tunnel.left, left), (&mut tunnel.right, right)] {
                side.process.kill().unwrap();
                side.process.wait().unwrap();
                side.process = Side::spawn(side.host, Kind::Offload(offload), &side.interface);
                answers(&side.interface);
                side.wg(&format!("private-key /run/{}.key listen-port {}", side.host.name(), side.port));
                assert_eq!(has_vnet_header(side), matches!(offload, "on" | "tun"), "{offload}");
                told(side, offload);
            }
            let endpoint = format!("192.0.2.2:{}", tunnel.right.port);
            tunnel.left.befriend(&tunnel.right, Some(&endpoint));
            tunnel.right.befriend(&tunnel.left, None);
            Host::Left.reaches("10.9.0.2");
            for (from, to) in EACH_WAY {
                transfer(from, to.parse().unwrap(), SIZE / 4);
            }
        }
    });
}

#[test]
fn an_unknown_value_of_the_switch_is_refused_by_name() {
    in_world(|| {
        let mut command = Host::Left.command(world::ours());
        let output = command.args(["-f", "wg-left"]).env("MARGAY_OFFLOAD", "none").output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("MARGAY_OFFLOAD=none: not on, off, tun or udp"), "{said}");
    });
}
