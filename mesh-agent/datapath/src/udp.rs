//! The UDP sockets: one for each address family that the host has.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use crate::process::sockopt;

/// Bytes of each socket's buffers: bursts arrive faster than any one wake-up.
const BUFFER: usize = 7 << 20;
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
}

impl Sockets {
    /// Binds `port`, or a random free one for 0. A family that the host does not have is left out.
    pub fn bind(port: u16, fwmark: u32) -> io::Result<Self> {
        let mut attempts = if port == 0 { ATTEMPTS } else { 1 };
        loop {
            attempts -= 1;
            match Self::try_bind(port, fwmark) {
                Err(e) if e.kind() == io::ErrorKind::AddrInUse && attempts > 0 => {}
                result => return result,
            }
        }
    }

    fn try_bind(port: u16, fwmark: u32) -> io::Result<Self> {
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
        let mut sockets = Self { ipv4, ipv6, port, fwmark: 0 };
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
        let mut sockets =
            Self { ipv4: clone(&self.ipv4)?, ipv6: clone(&self.ipv6)?, port: self.port, fwmark: self.fwmark };
        sockets.set_fwmark(fwmark)?;
        Ok(sockets)
    }

    /// Those that there are.
    pub fn all(&self) -> impl Iterator<Item = &UdpSocket> {
        self.ipv4.iter().chain(&self.ipv6)
    }

    /// Sends one datagram by the endpoint's family.
    pub fn send(&self, datagram: &[u8], to: &SocketAddr) -> io::Result<()> {
        let socket = if to.is_ipv4() { &self.ipv4 } else { &self.ipv6 };
        let socket = socket.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))?;
        socket.send_to(datagram, to).map(drop)
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
mod tests {
    use super::*;

    #[test]
    fn a_missing_address_family_is_left_out_and_the_other_one_works() {
        for errno in [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL] {
            assert!(available(Err(io::Error::from_raw_os_error(errno))).unwrap().is_none());
        }
        assert!(available(Err(io::Error::from_raw_os_error(libc::EADDRINUSE))).is_err());
        let sockets = Sockets { ipv6: None, ..Sockets::bind(0, 0).unwrap() };
        let port = sockets.port;
        let refused = sockets.send(b"x", &SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EAFNOSUPPORT));
        sockets.send(b"x", &SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)).unwrap();
        let received = sockets.ipv4.as_ref().unwrap();
        received.set_nonblocking(false).unwrap();
        assert_eq!(received.recv(&mut [0; 8]).unwrap(), 1);
    }

    #[test]
    fn both_families_share_a_port_and_a_taken_one_is_refused() {
        let sockets = Sockets::bind(0, 0).unwrap();
        let ports: Vec<_> = sockets.all().map(|s| s.local_addr().unwrap().port()).collect();
        assert!(ports.iter().all(|port| *port == sockets.port));
        assert_eq!(Sockets::bind(sockets.port, 0).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
