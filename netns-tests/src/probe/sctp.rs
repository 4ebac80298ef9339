//! SCTP's first two messages (RFC 9260) by raw sockets: INIT with a nonce in a parameter that the receiver
//! does not know, which section 3.2.1 has it send back in the INIT ACK.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::{Outcome, Probe};

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
/// An unknown parameter type whose upper bits say: skip it, and report it.
const NONCE: u16 = 0xfa67;
const UNRECOGNIZED: u16 = 8;
const COOKIE: u16 = 7;

/// What an INIT asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// Source port.
    pub from: u16,
    /// Destination port.
    pub to: u16,
    /// Initiate tag: the answer's verification tag.
    pub tag: u32,
    /// The nonce.
    pub nonce: Option<u128>,
}

/// A message as far as probes need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Somebody wants in.
    Init(Init),
    /// The answer: ports swapped, `tag` is the verification tag.
    InitAck(Init),
    /// A refusal.
    Abort {
        /// Source port.
        from: u16,
        /// Destination port.
        to: u16,
        /// Verification tag.
        tag: u32,
    },
}

/// CRC32c (Castagnoli), reflected, as RFC 9260 appendix A wants it.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1)))
    })
}

fn seal(mut packet: Vec<u8>) -> Vec<u8> {
    let sum = crc32c(&packet).to_le_bytes();
    if let Some(field) = packet.get_mut(8..12) {
        field.copy_from_slice(&sum);
    }
    packet
}

fn header(from: u16, to: u16, tag: u32) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &tag.to_be_bytes(), &[0; 4]].concat()
}

fn parameter(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len()) as u16;
    let mut bytes = [&kind.to_be_bytes()[..], &length.to_be_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn chunk(kind: u8, tag: u32, parameters: &[u8]) -> Vec<u8> {
    let length = (20 + parameters.len()) as u16;
    let mut bytes = vec![kind, 0];
    bytes.extend(length.to_be_bytes());
    bytes.extend(tag.to_be_bytes());
    bytes.extend(65_536u32.to_be_bytes()); // advertised receiver window
    bytes.extend([0, 1, 0, 1]); // one stream each way
    bytes.extend(tag.to_be_bytes()); // initial TSN: any number
    bytes.extend(parameters);
    bytes
}

/// An INIT.
pub fn init(init: Init) -> Vec<u8> {
    let nonce = init.nonce.map(|nonce| parameter(NONCE, &nonce.to_be_bytes())).unwrap_or_default();
    seal([header(init.from, init.to, 0), chunk(INIT, init.tag, &nonce)].concat())
}

/// The INIT ACK to an INIT.
pub fn init_ack(asked: Init, tag: u32) -> Vec<u8> {
    let mut parameters = parameter(COOKIE, b"margay-lab-cookie");
    if let Some(nonce) = asked.nonce {
        parameters.extend(parameter(UNRECOGNIZED, &parameter(NONCE, &nonce.to_be_bytes())));
    }
    seal([header(asked.to, asked.from, asked.tag), chunk(INIT_ACK, tag, &parameters)].concat())
}

/// Reads a packet; None for one with a wrong checksum, or of another kind.
pub fn parse(packet: &[u8]) -> Option<Message> {
    let half = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?));
    let mut unsealed = packet.to_vec();
    unsealed.get_mut(8..12)?.fill(0);
    if crc32c(&unsealed).to_le_bytes() != packet.get(8..12)? {
        return None;
    }
    let (from, to, verification) = (half(0)?, half(2)?, word(4)?);
    let kind = *packet.get(12)?;
    if kind == ABORT {
        return Some(Message::Abort { from, to, tag: verification });
    }
    let length = usize::from(half(14)?);
    let nonce = find_nonce(packet.get(32..12 + length)?);
    match kind {
        INIT if verification == 0 => Some(Message::Init(Init { from, to, tag: word(16)?, nonce })),
        INIT_ACK => Some(Message::InitAck(Init { from, to, tag: verification, nonce })),
        _ => None,
    }
}

fn find_nonce(mut parameters: &[u8]) -> Option<u128> {
    while let [k0, k1, l0, l1, rest @ ..] = parameters {
        let kind = u16::from_be_bytes([*k0, *k1]);
        let length = usize::from(u16::from_be_bytes([*l0, *l1])).checked_sub(4)?;
        let value = rest.get(..length)?;
        match kind {
            NONCE => return Some(u128::from_be_bytes(value.try_into().ok()?)),
            UNRECOGNIZED => return find_nonce(value),
            _ => parameters = rest.get(length.next_multiple_of(4)..).unwrap_or_default(),
        }
    }
    None
}

/// A raw SCTP socket bound to an address of the current namespace.
pub(super) fn raw_socket(address: std::net::IpAddr) -> io::Result<Socket> {
    let address = SocketAddr::new(address, 0);
    let socket =
        Socket::new(Domain::for_address(address), Type::RAW, Some(Protocol::from(nix::libc::IPPROTO_SCTP)))?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// The SCTP packet in what a raw socket received: IPv4 comes with its header, IPv6 without.
pub(super) fn payload(received: &[u8], v4: bool) -> &[u8] {
    let header = if v4 { received.first().map_or(0, |byte| usize::from(byte & 0xf) * 4) } else { 0 };
    received.get(header..).unwrap_or_default()
}

/// One attempt, in the current network namespace.
pub(super) fn probe(probe: &Probe, nonce: u128, limit: Duration) -> Outcome {
    let asked = Init {
        from: rand::random_range(20_000..60_000),
        to: probe.port,
        tag: rand::random(),
        nonce: Some(nonce),
    };
    match exchange(probe, asked, limit) {
        Ok(outcome) => outcome,
        Err(error) => match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Outcome::Dropped,
            _ => Outcome::Refused(error.to_string()),
        },
    }
}

fn exchange(probe: &Probe, asked: Init, limit: Duration) -> io::Result<Outcome> {
    let deadline = Instant::now() + limit;
    let socket = raw_socket(probe.src)?;
    // Connected, so that an ICMP error is said to this socket.
    socket.connect(&SocketAddr::new(probe.dst, 0).into())?;
    let mut resend = Instant::now();
    loop {
        let now = Instant::now();
        if now >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if now >= resend {
            socket.send(&init(asked))?;
            resend = now + limit / 3;
        }
        let wait = resend.min(deadline).saturating_duration_since(now).max(Duration::from_millis(1));
        socket.set_read_timeout(Some(wait))?;
        let received = match receive(&socket) {
            Ok((received, _)) => received,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                continue;
            }
            Err(error) => return Err(error),
        };
        let ours = |from: u16, to: u16, tag: u32| (from, to, tag) == (asked.to, asked.from, asked.tag);
        match parse(payload(&received, probe.dst.is_ipv4())) {
            Some(Message::InitAck(ack)) if ours(ack.from, ack.to, ack.tag) => {
                return Ok(match ack.nonce == asked.nonce {
                    true => Outcome::Allowed,
                    false => Outcome::Wrong("INIT ACK without the nonce".into()),
                });
            }
            Some(Message::Abort { from, to, tag }) if ours(from, to, tag) => {
                return Ok(Outcome::Refused("ABORT".into()));
            }
            _ => {}
        }
    }
}

/// Receives one packet with the sender's address.
pub(super) fn receive(socket: &Socket) -> io::Result<(Vec<u8>, Option<SocketAddr>)> {
    let mut bytes = vec![0; 2048];
    let (count, from) =
        nix::sys::socket::recvfrom::<nix::sys::socket::SockaddrStorage>(socket.as_raw_fd(), &mut bytes)?;
    bytes.truncate(count);
    let from = from.and_then(|from| match (from.as_sockaddr_in(), from.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddr::from(std::net::SocketAddrV4::from(*v4))),
        (_, Some(v6)) => Some(SocketAddr::from(std::net::SocketAddrV6::from(*v6))),
        _ => None,
    });
    Ok((bytes, from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn crc32c_is_the_published_one() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa); // RFC 3720 appendix B.4
    }

    #[test]
    fn the_ack_answers_the_init_with_its_nonce() {
        let asked = Init { from: 4000, to: 80, tag: 77, nonce: Some(1 << 99) };
        assert_eq!(parse(&init(asked)), Some(Message::Init(asked)));
        let Some(Message::InitAck(ack)) = parse(&init_ack(asked, 5)) else { panic!("INIT ACK expected") };
        assert_eq!((ack.from, ack.to, ack.tag, ack.nonce), (80, 4000, 77, asked.nonce));
    }

    #[test]
    fn a_changed_bit_is_refused() {
        let mut packet = init(Init { from: 1, to: 2, tag: 3, nonce: Some(4) });
        packet[40] ^= 1;
        assert_eq!(parse(&packet), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = parse(&seal(bytes.clone()));
            let _ = parse(payload(&bytes, true));
        }
    }
}
