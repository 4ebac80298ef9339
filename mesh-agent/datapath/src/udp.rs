//! The UDP sockets: one for each address family that the host has.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use mesh_uapi::{Offload, stats};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{setsockopt, sockopt::UdpGroSegment};
use socket2::{Domain, Protocol, Socket, Type};

use crate::batch::Run;
use crate::process::sockopt;

pub mod many;

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
    /// With which errno; 0 while nobody has.
    segments_refused: AtomicI32,
    /// Whether datagrams are received many at once.
    gro: Offload,
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
        let ipv4 = available(open(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)))?;
        let port = match &ipv4 {
            Some(socket) => socket.local_addr()?.port(),
            None => port,
        };
        let ipv6 = available(open(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)))?;
        let port = match &ipv6 {
            Some(socket) => socket.local_addr()?.port(),
            None => port,
        };
        if ipv4.is_none() && ipv6.is_none() {
            return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
        }
        let segments_below = AtomicUsize::new(if offload { usize::MAX } else { 0 });
        let segments_refused = AtomicI32::new(0);
        let mut sockets =
            Self { ipv4, ipv6, port, fwmark: 0, segments_below, segments_refused, gro: Offload::Off };
        if offload {
            sockets.gro = sockets.receive_many();
        }
        if fwmark != 0 {
            sockets.set_fwmark(fwmark)?;
        }
        Ok(sockets)
    }

    /// Best effort: without it, datagrams come one by one.
    fn receive_many(&self) -> Offload {
        let set = self.all().try_for_each(|socket| setsockopt(socket, UdpGroSegment, &true));
        set.map_or_else(|errno| Offload::Refused(errno as i32), |()| Offload::On)
    }

    /// What is sent and received many at once, by name, and why not.
    pub fn offloads(&self) -> [(&'static str, Offload); 2] {
        let errno = self.segments_refused.load(Ordering::Relaxed);
        let gso = match self.segments_below.load(Ordering::Relaxed) {
            usize::MAX => Offload::On,
            0 if errno == 0 => Offload::Off,
            0 => Offload::Refused(errno),
            bytes => Offload::Below(u32::try_from(bytes).unwrap_or(u32::MAX), errno),
        };
        [(stats::offload::UDP_GSO, gso), (stats::offload::UDP_GRO, self.gro.clone())]
    }

    /// Goes on with sockets that another process bound.
    pub fn adopt([ipv4, ipv6]: [Option<UdpSocket>; 2], fwmark: u32, offload: bool) -> io::Result<Self> {
        let Some(any) = ipv4.as_ref().or(ipv6.as_ref()) else {
            return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
        };
        let port = any.local_addr()?.port();
        let segments_below = AtomicUsize::new(if offload { usize::MAX } else { 0 });
        let segments_refused = AtomicI32::new(0);
        let mut sockets =
            Self { ipv4, ipv6, port, fwmark, segments_below, segments_refused, gro: Offload::Off };
        if offload {
            sockets.gro = sockets.receive_many();
        } else {
            // The last owner may have had it on. Where the kernel has it, it can be turned off.
            let _ = sockets.all().try_for_each(|socket| setsockopt(socket, UdpGroSegment, &false));
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
        let segments_refused = AtomicI32::new(self.segments_refused.load(Ordering::Relaxed));
        let mut sockets = Self {
            ipv4,
            ipv6,
            port: self.port,
            fwmark: self.fwmark,
            segments_below,
            segments_refused,
            gro: self.gro.clone(),
        };
        sockets.set_fwmark(fwmark)?;
        Ok(sockets)
    }

    /// Those that there are.
    pub fn all(&self) -> impl Iterator<Item = &UdpSocket> {
        self.ipv4.iter().chain(&self.ipv6)
    }

    /// Sends runs, in order, by their endpoints' families: many at once, and each run at once if the kernel can cut it
    /// (UDP_SEGMENT), else one by one. Tells `failed` of the datagrams that were not sent.
    pub fn send(
        &self,
        runs: &[Run<'_, SocketAddr>],
        mut failed: impl FnMut(&Run<'_, SocketAddr>, u64, io::Error),
    ) {
        let mut rest = runs;
        while let Some(first) = rest.first() {
            let socket = if first.to.is_ipv4() { &self.ipv4 } else { &self.ipv6 };
            let below = self.segments_below.load(Ordering::Relaxed);
            let at_once = |run: &&Run<'_, SocketAddr>| {
                run.to.is_ipv4() == first.to.is_ipv4()
                    && (run.bytes.len() <= run.segment || run.segment < below)
            };
            let count = rest.iter().take_while(at_once).take(many::SENT).count();
            let Some(socket) = socket else {
                let missing = io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
                failed(first, first.packets().count() as u64, missing);
                rest = rest.get(1..).unwrap_or_default();
                continue;
            };
            let done = match count {
                0 => {
                    self.send_singly(socket, first, &mut failed);
                    1
                }
                _ => match patiently(socket, || many::send(socket, rest.get(..count).unwrap_or_default())) {
                    Ok(sent) => sent.max(1),
                    Err(e) => {
                        let full = e.kind() == io::ErrorKind::WouldBlock;
                        if full || first.bytes.len() <= first.segment {
                            failed(first, first.packets().count() as u64, e);
                        } else {
                            self.learn(first.segment, &e);
                            self.send_singly(socket, first, &mut failed);
                        }
                        1
                    }
                },
            };
            rest = rest.get(done..).unwrap_or_default();
        }
    }

    fn send_singly(
        &self,
        socket: &UdpSocket,
        run: &Run<'_, SocketAddr>,
        failed: &mut impl FnMut(&Run<'_, SocketAddr>, u64, io::Error),
    ) {
        for datagram in run.packets() {
            if let Err(e) = patiently(socket, || socket.send_to(datagram, run.to).map(drop)) {
                failed(run, 1, e);
            }
        }
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
        self.segments_refused.store(error.raw_os_error().unwrap_or(0), Ordering::Relaxed);
        tracing::debug!("segments of {segment} bytes: {error}; one by one from {below} bytes on");
    }
}

/// Once more when the socket's buffer is full and has room again soon: waiting slows the sender down, as a slow
/// link should.
fn patiently<T>(socket: &UdpSocket, send: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match send() {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], PATIENCE_MS);
            send()
        }
        result => result,
    }
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

fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    // A datagram over the path's MTU is cut into fragments, as in the kernel's WireGuard, not refused.
    sockopt::dont_discover_mtu(&socket, address.is_ipv6())?;
    enlarge(&socket);
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
mod tests;
