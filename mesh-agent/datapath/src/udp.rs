//! The UDP sockets: one for each address family that the host has.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt::UdpGroSegment,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::batch::Run;
use crate::process::sockopt;

/// Bytes of each socket's buffers: bursts arrive faster than any one wake-up.
const BUFFER: usize = 7 << 20;
/// Longest wait for room in a full send buffer.
const PATIENCE_MS: u8 = 50;
/// Random ports tried until one is free in both families.
const ATTEMPTS: usize = 16;

/// The sockets of one port.
#[derive(Debug)]
pub struct Sockets {
    /// For IPv4 endpoints.
    pub ipv4: Option<UdpSocket>,
    /// For IPv6 endpoints.
    pub ipv6: Option<UdpSocket>,
    /// The port of both.
    pub port: u16,
    /// SO_MARK on both; 0 for none.
    pub fwmark: u32,
    /// Datagrams of this length or more are not sent many at once: the kernel or the device refused.
    segments_below: AtomicUsize,
}

impl Sockets {
    /// Binds `port`, or a random free one for 0. A family that the host does not have is left out. With `offload`
    /// datagrams are sent and received many at once.
    pub fn bind(port: u16, fwmark: u32, offload: bool) -> io::Result<Self> {
        let mut attempts = if port == 0 { ATTEMPTS } else { 1 };
        loop {
            attempts -= 1;
            match Self::try_bind(port, fwmark, offload) {
                Err(e) if e.kind() == io::ErrorKind::AddrInUse && attempts > 0 => {}
                result => return result,
            }
        }
    }

    fn try_bind(port: u16, fwmark: u32, offload: bool) -> io::Result<Self> {
        let ipv4 = available(open(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port), offload))?;
        let port = match &ipv4 {
            Some(socket) => socket.local_addr()?.port(),
            None => port,
        };
        let ipv6 = available(open(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port), offload))?;
        let port = match &ipv6 {
            Some(socket) => socket.local_addr()?.port(),
            None => port,
        };
        if ipv4.is_none() && ipv6.is_none() {
            return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
        }
        let segments_below = AtomicUsize::new(if offload { usize::MAX } else { 0 });
        let mut sockets = Self { ipv4, ipv6, port, fwmark: 0, segments_below };
        if fwmark != 0 {
            sockets.set_fwmark(fwmark)?;
        }
        Ok(sockets)
    }

    fn set_fwmark(&mut self, fwmark: u32) -> io::Result<()> {
        for socket in self.all() {
            socket2::SockRef::from(socket).set_mark(fwmark)?;
        }
        self.fwmark = fwmark;
        Ok(())
    }

    /// The same sockets under another mark; the old ones see it too.
    pub fn with_fwmark(&self, fwmark: u32) -> io::Result<Self> {
        let clone = |s: &Option<UdpSocket>| s.as_ref().map(UdpSocket::try_clone).transpose();
        let (ipv4, ipv6) = (clone(&self.ipv4)?, clone(&self.ipv6)?);
        let segments_below = AtomicUsize::new(self.segments_below.load(Ordering::Relaxed));
        let mut sockets = Self { ipv4, ipv6, port: self.port, fwmark: self.fwmark, segments_below };
        sockets.set_fwmark(fwmark)?;
        Ok(sockets)
    }

    /// Those that there are.
    pub fn all(&self) -> impl Iterator<Item = &UdpSocket> {
        self.ipv4.iter().chain(&self.ipv6)
    }

    /// Sends a run by the endpoint's family: at once if it is more than one datagram and the kernel can cut it
    /// (UDP_SEGMENT), else one by one. Returns how many datagrams failed, with the last error.
    pub fn send(&self, run: &Run<'_, SocketAddr>) -> Result<(), (u64, io::Error)> {
        let socket = if run.to.is_ipv4() { &self.ipv4 } else { &self.ipv6 };
        let Some(socket) = socket else {
            let failed = run.packets().count() as u64;
            return Err((failed, io::Error::from_raw_os_error(libc::EAFNOSUPPORT)));
        };
        if run.bytes.len() > run.segment && run.segment < self.segments_below.load(Ordering::Relaxed) {
            match patiently(socket, || send_segments(socket, run)) {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err((run.packets().count() as u64, e));
                }
                Err(e) => self.learn(run.segment, &e),
            }
        }
        let mut result = Ok(());
        for datagram in run.packets() {
            if let Err(e) = patiently(socket, || socket.send_to(datagram, run.to).map(drop)) {
                let before = result.map_or_else(|(failed, _)| failed, |()| 0);
                result = Err((before + 1, e));
            }
        }
        result
    }

    /// A device without checksum offload refuses all segments (EIO), a path too narrow those that would have to
    /// be cut once more (EINVAL, EMSGSIZE). Other errors are the destination's.
    fn learn(&self, segment: usize, error: &io::Error) {
        let below = match error.raw_os_error() {
            Some(libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT) => 0,
            Some(libc::EINVAL | libc::EMSGSIZE) => segment,
            _ => return,
        };
        self.segments_below.fetch_min(below, Ordering::Relaxed);
        tracing::debug!("segments of {segment} bytes: {error}; one by one from {below} bytes on");
    }
}

fn send_segments(socket: &UdpSocket, run: &Run<'_, SocketAddr>) -> io::Result<()> {
    let segment = u16::try_from(run.segment).map_err(|_| io::Error::from(Errno::EINVAL))?;
    let control = [ControlMessage::UdpGsoSegments(&segment)];
    let to = SockaddrStorage::from(*run.to);
    let data = [io::IoSlice::new(run.bytes)];
    sendmsg(socket.as_raw_fd(), &data, &control, MsgFlags::empty(), Some(&to))?;
    Ok(())
}

/// Once more when the socket's buffer is full and has room again soon: waiting slows the sender down, as a slow
/// link should.
fn patiently(socket: &UdpSocket, send: impl Fn() -> io::Result<()>) -> io::Result<()> {
    match send() {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], PATIENCE_MS);
            send()
        }
        result => result,
    }
}

/// Receives one or more datagrams of one sender (UDP_GRO): their bytes are at the start of `buffer`. Returns who,
/// how many bytes, and how long each is but perhaps the last.
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(SocketAddr, usize, usize)> {
    let mut control = cmsg_space!(i32);
    let mut data = [io::IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut data, Some(&mut control), MsgFlags::empty())?;
    let segment = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::UdpGroSegments(segment) => usize::try_from(segment).ok(),
        _ => None,
    });
    let from = message.address.and_then(|address| {
        let v4 = address.as_sockaddr_in().map(|a| SocketAddr::V4((*a).into()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| SocketAddr::V6((*a).into())))
    });
    let from = from.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok((from, message.bytes, segment.unwrap_or(message.bytes)))
}

/// `None` for a family that this host lacks.
fn available(result: io::Result<UdpSocket>) -> io::Result<Option<UdpSocket>> {
    match result {
        Ok(socket) => Ok(Some(socket)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            tracing::info!("no socket of one address family: {e}");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

fn open(address: SocketAddr, offload: bool) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    // A datagram over the path's MTU is cut into fragments, as in the kernel's WireGuard, not refused.
    sockopt::dont_discover_mtu(&socket, address.is_ipv6())?;
    enlarge(&socket);
    if offload {
        // Best effort: without it, datagrams come one by one.
        let _ = setsockopt(&socket, UdpGroSegment, &true);
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Best effort: a smaller buffer works, and loses more in bursts.
fn enlarge(socket: &Socket) {
    if sockopt::force_buffers(socket, BUFFER).is_err() {
        let _ = socket.set_recv_buffer_size(BUFFER);
        let _ = socket.set_send_buffer_size(BUFFER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_address_family_is_left_out_and_the_other_one_works() {
        for errno in [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL] {
            assert!(available(Err(io::Error::from_raw_os_error(errno))).unwrap().is_none());
        }
        assert!(available(Err(io::Error::from_raw_os_error(libc::EADDRINUSE))).is_err());
        let sockets = Sockets { ipv6: None, ..Sockets::bind(0, 0, true).unwrap() };
        let [v6, v4] = [Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()]
            .map(|ip: IpAddr| SocketAddr::new(ip, sockets.port));
        let (failed, error) = sockets.send(&Run { bytes: b"xyz", segment: 1, to: &v6 }).unwrap_err();
        assert_eq!((failed, error.raw_os_error()), (3, Some(libc::EAFNOSUPPORT)));
        sockets.send(&Run { bytes: b"x", segment: 1, to: &v4 }).unwrap();
        let received = sockets.ipv4.as_ref().unwrap();
        received.set_nonblocking(false).unwrap();
        assert_eq!(receive(received, &mut [0; 8]).unwrap(), (v4, 1, 1));
    }

    #[test]
    fn a_run_arrives_whole_and_in_order_in_segments_or_one_by_one() {
        let run: Vec<u8> = (0..60_000u32).map(|n| (n / 7) as u8).collect();
        for family in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
            for segments_below in [usize::MAX, 0] {
                let sockets = Sockets::bind(0, 0, true).unwrap();
                sockets.segments_below.store(segments_below, Ordering::Relaxed);
                let to = SocketAddr::new(family, sockets.port);
                sockets.send(&Run { bytes: &run, segment: 1452, to: &to }).unwrap();
                let socket = if to.is_ipv4() { &sockets.ipv4 } else { &sockets.ipv6 }.as_ref().unwrap();
                socket.set_nonblocking(false).unwrap();
                let (mut received, mut buffer) = (Vec::new(), vec![0; 65_536]);
                while received.len() < run.len() {
                    let (from, length, segment) = receive(socket, &mut buffer).unwrap();
                    assert_eq!((from, segment.min(1452)), (to, segment));
                    received.extend_from_slice(&buffer[..length]);
                }
                assert_eq!(received, run);
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
        sockets.learn(1452, &io::Error::from_raw_os_error(libc::EINVAL));
        sockets.learn(9000, &io::Error::from_raw_os_error(libc::EINVAL));
        assert_eq!(sockets.segments_below.load(Ordering::Relaxed), 1452);
        sockets.learn(100, &io::Error::from_raw_os_error(libc::EIO));
        assert_eq!(sockets.segments_below.load(Ordering::Relaxed), 0);
        sockets.send(&Run { bytes: b"abc", segment: 1, to: &to }).unwrap();
        assert_eq!(receive(sockets.ipv4.as_ref().unwrap(), &mut [0; 8]).unwrap().1, 1);
    }

    #[test]
    fn both_families_share_a_port_and_a_taken_one_is_refused() {
        let sockets = Sockets::bind(0, 0, true).unwrap();
        let ports: Vec<_> = sockets.all().map(|s| s.local_addr().unwrap().port()).collect();
        assert!(ports.iter().all(|port| *port == sockets.port));
        assert_eq!(Sockets::bind(sockets.port, 0, true).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
