#![allow(clippy::unwrap_used)]

use super::many::{MESSAGE, Message, RECEIVED};
use super::*;

fn send(sockets: &Sockets, run: &Run<'_, SocketAddr>) -> (u64, Option<i32>) {
    let mut result = (0, None);
    sockets.send(std::slice::from_ref(run), |_, count, e| {
        result = (result.0 + count, e.raw_os_error());
    });
    result
}

/// Waits for messages; returns them with their bytes.
fn receive(socket: &UdpSocket) -> Vec<(Message, Vec<u8>)> {
    let mut buffer = vec![0; RECEIVED * MESSAGE];
    let mut messages = [None; RECEIVED];
    poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], 5000u16).unwrap();
    let count = many::receive(socket, &mut buffer, &mut messages).unwrap();
    let all = messages.iter().zip(buffer.chunks(MESSAGE)).take(count);
    all.map(|(message, bytes)| (message.unwrap(), bytes[..message.unwrap().length].to_vec())).collect()
}

#[test]
fn a_missing_address_family_is_left_out_and_the_other_one_works() {
    for errno in [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL] {
        assert!(available(Err(io::Error::from_raw_os_error(errno))).unwrap().is_none());
    }
    assert!(available(Err(io::Error::from_raw_os_error(libc::EADDRINUSE))).is_err());
    let sockets = Sockets { ipv6: None, ..Sockets::bind(0, 0, true).unwrap() };
    let [v6, v4] = [Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()]
        .map(|ip: IpAddr| SocketAddr::new(ip, sockets.port));
    assert_eq!(send(&sockets, &Run { bytes: b"xyz", segment: 1, to: &v6 }), (3, Some(libc::EAFNOSUPPORT)));
    assert_eq!(send(&sockets, &Run { bytes: b"x", segment: 1, to: &v4 }), (0, None));
    let (message, bytes) = receive(sockets.ipv4.as_ref().unwrap()).remove(0);
    assert_eq!((message, bytes.as_slice()), (Message { from: v4, length: 1, segment: 1 }, &b"x"[..]));
}

#[test]
fn runs_arrive_whole_and_in_order_in_segments_or_one_by_one() {
    let bytes: Vec<u8> = (0..60_000u32).map(|n| (n / 7) as u8).collect();
    for family in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        for segments_below in [usize::MAX, 0] {
            let sockets = Sockets::bind(0, 0, true).unwrap();
            sockets.segments_below.store(segments_below, Ordering::Relaxed);
            let to = SocketAddr::new(family, sockets.port);
            let run = |range: std::ops::Range<usize>| Run { bytes: &bytes[range], segment: 1452, to: &to };
            let runs = [run(0..30_000), run(30_000..31_000), run(31_000..60_000)];
            sockets.send(&runs, |_, _, e| panic!("{e}"));
            let socket = if to.is_ipv4() { &sockets.ipv4 } else { &sockets.ipv6 }.as_ref().unwrap();
            let mut received = Vec::new();
            while received.len() < bytes.len() {
                for (message, bytes) in receive(socket) {
                    assert_eq!((message.from, message.segment.min(1452)), (to, message.segment));
                    received.extend(bytes);
                }
            }
            assert_eq!(received, bytes);
            assert_eq!(sockets.segments_below.load(Ordering::Relaxed), segments_below);
        }
    }
}

#[test]
fn what_is_refused_in_segments_goes_out_one_by_one() {
    let sockets = Sockets::bind(0, 0, true).unwrap();
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), sockets.port);
    sockets.learn(1452, &io::Error::from_raw_os_error(libc::EHOSTUNREACH));
    assert_eq!(sockets.segments_below.load(Ordering::Relaxed), usize::MAX);
    let gso = || sockets.offloads()[0].1.clone();
    assert_eq!(gso(), Offload::On);
    sockets.learn(1452, &io::Error::from_raw_os_error(libc::EINVAL));
    sockets.learn(9000, &io::Error::from_raw_os_error(libc::EINVAL));
    assert_eq!(sockets.segments_below.load(Ordering::Relaxed), 1452);
    assert_eq!(gso(), Offload::Below(1452, libc::EINVAL));
    sockets.learn(100, &io::Error::from_raw_os_error(libc::EIO));
    assert_eq!(sockets.segments_below.load(Ordering::Relaxed), 0);
    assert_eq!(gso(), Offload::Refused(libc::EIO));
    let all = Sockets::bind(0, 0, false).unwrap().offloads();
    assert!(all.iter().all(|(_, state)| *state == Offload::Off), "{all:?}");
    assert_eq!(send(&sockets, &Run { bytes: b"abc", segment: 1, to: &to }), (0, None));
    assert_eq!(receive(sockets.ipv4.as_ref().unwrap())[0].0.length, 1);
}

#[test]
fn one_run_that_fails_does_not_take_the_others_with_it() {
    let sockets = Sockets::bind(0, 0, true).unwrap();
    let good = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), sockets.port);
    // Broadcast is refused to a socket that did not ask for it.
    let bad = SocketAddr::from(([255, 255, 255, 255], 9));
    let run = |bytes: &'static [u8], to| Run { bytes, segment: bytes.len(), to };
    let mut failed = Vec::new();
    sockets.send(&[run(b"a", &good), run(b"b", &bad), run(b"c", &good)], |run, count, _| {
        failed.push((*run.to, count));
    });
    assert_eq!(failed, [(bad, 1)]);
    let socket = sockets.ipv4.as_ref().unwrap();
    let received: Vec<u8> = receive(socket).into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(received, b"ac");
}

#[test]
fn both_families_share_a_port_and_a_taken_one_is_refused() {
    let sockets = Sockets::bind(0, 0, true).unwrap();
    let ports: Vec<_> = sockets.all().map(|s| s.local_addr().unwrap().port()).collect();
    assert!(ports.iter().all(|port| *port == sockets.port));
    assert_eq!(Sockets::bind(sockets.port, 0, true).unwrap_err().kind(), io::ErrorKind::AddrInUse);
}
