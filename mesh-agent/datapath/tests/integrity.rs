//! What goes into the tunnel comes out of it: 200 MB by hash, sizes of every kind, and a receiving kernel that verifies
//! checksums. Needs root.
//!
//! A TUN without large packets hands the kernel each packet without a word about its checksum (CHECKSUM_NONE), so the
//! kernel verifies it; with them, what was joined is handed over as verified, by us. Both are shown here with
//! segments whose checksum is wrong.
#![allow(clippy::unwrap_used)]

mod world;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use mesh_datapath::offload::checksum::Sum;
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};
use socket2::{Domain, Protocol, Socket, Type};
use world::{DEADLINE, Host, Kind, Side, in_world, tunnel};

const SIZE: usize = 200_000_000;
/// The largest TCP payload of a packet of 1420 bytes over IPv4, with timestamps.
const SEGMENT: usize = 1420 - 20 - 32;
type Hash = [u8; 32];

/// An address of a host in the tunnel.
fn inside(host: Host, v6: bool) -> IpAddr {
    let n = host.number();
    if v6 {
        Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, n.into()).into()
    } else {
        Ipv4Addr::new(10, 9, 0, n).into()
    }
}

/// Sends random bytes by TCP in writes of odd sizes; the hashes of what was sent and of what arrived.
fn stream(from: Host, v6: bool, size: usize) -> [JoinHandle<Hash>; 2] {
    let (ready, at) = mpsc::channel();
    let to = inside(from.other(), v6);
    let receiver = from.other().on_thread(move || {
        let listener = TcpListener::bind(SocketAddr::new(to, 0)).unwrap();
        ready.send(listener.local_addr().unwrap()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let (mut hash, mut buffer, mut received) = (Sha256::new(), vec![0; 1 << 18], 0);
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => break,
                n => {
                    hash.update(&buffer[..n]);
                    received += n;
                }
            }
        }
        assert_eq!(received, size);
        hash.finalize().into()
    });
    let at = at.recv_timeout(DEADLINE).unwrap();
    let sender = from.on_thread(move || {
        let mut stream = TcpStream::connect_timeout(&at, DEADLINE).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        let mut rng = StdRng::seed_from_u64(u64::from(at.port()));
        let (mut hash, mut buffer, mut left) = (Sha256::new(), vec![0; 1 << 18], size);
        while left > 0 {
            // Mostly large ones, and some that fill a segment not quite, just so and over.
            let n = match rng.random_range(0..8) {
                0 => rng.random_range(1..64),
                1 => rng.random_range(SEGMENT - 2..SEGMENT + 3),
                2 => 65_535,
                _ => rng.random_range(100_000..buffer.len()),
            };
            let block = &mut buffer[..n.min(left)];
            rng.fill_bytes(block);
            hash.update(&*block);
            stream.write_all(block).unwrap();
            left -= block.len();
        }
        hash.finalize().into()
    });
    [sender, receiver]
}

/// A number of a host's kernel: `Tcp: InCsumErrors` and such, both families together for TCP.
fn kernel(host: Host, protocol: &str, name: &str) -> u64 {
    let text = host.run("cat", "/proc/net/snmp");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(':'));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split_whitespace().zip(values.split_whitespace());
    pairs.find(|(found, _)| *found == name).unwrap().1.parse().unwrap()
}

/// The same of IPv6: `Udp6InCsumErrors`.
fn kernel_v6(host: Host, name: &str) -> u64 {
    let text = host.run("cat", "/proc/net/snmp6");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(char::is_whitespace));
    line.unwrap().trim().parse().unwrap()
}

fn checksum_errors(host: Host) -> [u64; 3] {
    let udp = kernel(host, "Udp", "InCsumErrors");
    [kernel(host, "Tcp", "InCsumErrors"), udp, kernel_v6(host, "Udp6InCsumErrors")]
}

/// Datagrams of many sizes, fragments among them, each sent back and compared.
fn datagrams(from: Host, v6: bool) {
    let (ready, at) = mpsc::channel();
    let to = inside(from.other(), v6);
    let full = if v6 { 1420 - 48 } else { 1420 - 28 };
    let sizes = (0..=40).chain(full - 20..=full + 20).chain([2000, 2999, 4001, 8191, 20_001, 60_003]);
    let sizes: Vec<usize> = sizes.collect();
    let count = sizes.len();
    let echo = from.other().on_thread(move || {
        let socket = UdpSocket::bind(SocketAddr::new(to, 0)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        ready.send(socket.local_addr().unwrap()).unwrap();
        let mut buffer = vec![0; 65_536];
        for _ in 0..count {
            let (n, from) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(&buffer[..n], from).unwrap();
        }
    });
    let at = at.recv_timeout(DEADLINE).unwrap();
    let sender = from.on_thread(move || {
        let socket = UdpSocket::bind(SocketAddr::new(inside(from, v6), 0)).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut rng = StdRng::seed_from_u64(9);
        let mut buffer = vec![0; 65_536];
        for size in sizes {
            let mut datagram = vec![0; size];
            rng.fill_bytes(&mut datagram);
            socket.send_to(&datagram, at).unwrap();
            let n = socket.recv(&mut buffer).unwrap();
            assert!(buffer[..n] == datagram, "{size} bytes came back as {n}, or changed");
        }
    });
    sender.join().unwrap();
    echo.join().unwrap();
}

/// 200 MB each way at the same time in both families, and datagrams; no checksum was ever wrong.
fn arrives_whole(left: &'static str, right: &'static str) {
    let tunnel = tunnel(Kind::Offload(left), Kind::Offload(right), "192.0.2.2:PORT");
    Host::Left.reaches("10.9.0.2");
    let errors = [Host::Left, Host::Right].map(checksum_errors);
    let before = [&tunnel.left, &tunnel.right].map(Side::packets);
    for v6 in [false, true] {
        let streams = [Host::Left, Host::Right].map(|from| stream(from, v6, SIZE));
        for hashes in streams {
            let [sent, received] = hashes.map(|end| end.join().unwrap());
            assert_eq!(sent, received, "{left} {right} v6 {v6}");
        }
    }
    let after = [&tunnel.left, &tunnel.right].map(Side::packets);
    for (side, offload) in [left, right].into_iter().enumerate() {
        let count = after[side][1] - before[side][1];
        let segments = 2 * (SIZE / SEGMENT) as u64;
        println!("{offload}: the kernel was given {count} packets for {segments} segments");
        // Each by itself: the kernel verified every one.
        assert!(!matches!(offload, "off" | "udp") || count >= segments, "{offload}: {count}");
    }
    for from in [Host::Left, Host::Right] {
        [false, true].into_iter().for_each(|v6| datagrams(from, v6));
    }
    assert_eq!([Host::Left, Host::Right].map(checksum_errors), errors);
    for side in [&tunnel.left, &tunnel.right] {
        assert_eq!((side.drops("bad_packet"), side.drops("bad_inner"), side.drops("bad_auth")), (0, 0, 0));
    }
}

#[test]
fn two_hundred_megabytes_arrive_whole_with_all_offloads() {
    in_world(|| arrives_whole("on", "on"));
}

#[test]
fn two_hundred_megabytes_arrive_whole_without_offloads() {
    in_world(|| arrives_whole("off", "off"));
}

#[test]
fn two_hundred_megabytes_arrive_whole_with_large_packets_on_the_tun_only() {
    in_world(|| arrives_whole("tun", "tun"));
}

#[test]
fn two_hundred_megabytes_arrive_whole_with_many_datagrams_at_once_only() {
    in_world(|| arrives_whole("udp", "udp"));
}

#[test]
fn two_hundred_megabytes_in_large_packets_arrive_at_a_kernel_that_verifies_every_segment() {
    in_world(|| arrives_whole("on", "off"));
}

/// A packet of TCP or UDP with the right checksum; `payload` is behind the header.
fn packet(from: SocketAddr, to: SocketAddr, tcp: Option<u32>, payload: &[u8]) -> Vec<u8> {
    let mut transport = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    match tcp {
        // Sequence and acknowledgement numbers; 20 bytes of header, ACK; window; checksum and urgent pointer.
        Some(sequence) => {
            transport.extend(sequence.to_be_bytes());
            transport.extend([0, 0, 0, 1, 0x50, 0x10, 2, 0, 0, 0, 0, 0]);
        }
        None => {
            transport.extend((8 + payload.len() as u16).to_be_bytes());
            transport.extend([0, 0]);
        }
    }
    transport.extend(payload);
    let (protocol, place) = if tcp.is_some() { (6, 16) } else { (17, 6) };
    let length = transport.len() as u16;
    let (mut ip, addresses) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut ip = vec![0x45, 0];
            ip.extend((20 + length).to_be_bytes());
            ip.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
            (ip, [from.octets(), to.octets()].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut ip = vec![0x60, 0, 0, 0];
            ip.extend(length.to_be_bytes());
            ip.extend([protocol, 64]);
            (ip, [from.octets(), to.octets()].concat())
        }
        _ => panic!("two families"),
    };
    let sum = Sum::default().with_pseudo_header(&addresses, protocol, length).with(&transport);
    transport[place..place + 2].copy_from_slice(&sum.finish_udp());
    ip.extend(addresses);
    if ip[0] == 0x45 {
        let sum = Sum::default().with(&ip);
        ip[10..12].copy_from_slice(&sum.finish());
    }
    [ip, transport].concat()
}

/// Sends packets from the left host as they are: its kernel touches no checksum of a raw socket.
fn send_raw(to: IpAddr, packets: Vec<Vec<u8>>) {
    let send = move || {
        let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        // IPPROTO_RAW: the packets bring their own headers, in both families (raw(7), RFC 3542 section 3).
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(255))).unwrap();
        for packet in packets {
            socket.send_to(&packet, &SocketAddr::new(to, 0).into()).unwrap();
        }
    };
    Host::Left.on_thread(send).join().unwrap();
}

/// Segments in a row and datagrams, every third with a byte changed on its way into the tunnel: the receiving kernel
/// counts exactly those, and an application gets only the others.
fn bad_checksums_are_found_by_the_kernel(kind: Kind) {
    let _tunnel = tunnel(Kind::Ours, kind, "192.0.2.2:PORT");
    Host::Left.reaches("10.9.0.2");
    for v6 in [false, true] {
        let (from, to) = (inside(Host::Left, v6), inside(Host::Right, v6));
        let ends = |port| (SocketAddr::new(from, 4242), SocketAddr::new(to, port));
        let spoil = |n: usize, mut packet: Vec<u8>| {
            if n % 3 == 2 {
                *packet.last_mut().unwrap() ^= 0x10;
            }
            packet
        };
        let before = checksum_errors(Host::Right);
        let (near, far) = ends(9);
        let segments = (0..30).map(|n| {
            let sequence = 1000 + (n * 1300) as u32;
            spoil(n, packet(near, far, Some(sequence), &[n as u8; 1300]))
        });
        send_raw(to, segments.collect());
        let (ready, at) = mpsc::channel();
        let (done, received) = mpsc::channel();
        let receiver = Host::Right.on_thread(move || {
            let socket = UdpSocket::bind(SocketAddr::new(to, 0)).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            ready.send(socket.local_addr().unwrap().port()).unwrap();
            let mut buffer = [0; 2000];
            for _ in 0..20 {
                let n = socket.recv(&mut buffer).unwrap();
                done.send(buffer[..n].to_vec()).unwrap();
            }
            // The last one is bad: whoever reads on makes the kernel look at it.
            socket.set_nonblocking(true).unwrap();
            thread::sleep(std::time::Duration::from_millis(100));
            assert!(socket.recv(&mut buffer).is_err());
        });
        let (near, far) = ends(at.recv_timeout(DEADLINE).unwrap());
        send_raw(to, (0..30).map(|n| spoil(n, packet(near, far, None, &[n as u8; 1000]))).collect());
        receiver.join().unwrap();
        let got: Vec<Vec<u8>> = received.try_iter().collect();
        let good = (0..30).filter(|n| n % 3 != 2).map(|n| vec![n as u8; 1000]);
        assert_eq!(got, good.collect::<Vec<_>>());
        let after = checksum_errors(Host::Right);
        let found: Vec<u64> = after.iter().zip(before).map(|(after, before)| after - before).collect();
        assert_eq!(found, if v6 { [10, 0, 10] } else { [10, 10, 0] }, "v6 {v6}");
    }
}

#[test]
fn bad_checksums_are_found_behind_large_packets() {
    in_world(|| bad_checksums_are_found_by_the_kernel(Kind::Offload("on")));
}

#[test]
fn bad_checksums_are_found_without_large_packets() {
    in_world(|| bad_checksums_are_found_by_the_kernel(Kind::Offload("off")));
}

#[test]
fn bad_checksums_are_found_behind_other_implementations() {
    in_world(|| bad_checksums_are_found_by_the_kernel(Kind::Boringtun));
}
