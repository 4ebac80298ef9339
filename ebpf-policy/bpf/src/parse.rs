//! From bytes to what the verdict needs of a packet.
//!
//! No assumption about length or layout beyond what is read: a GSO packet of 64 kB and a truncated one take the same path.

use crate::layout::{Addr, Reason};

/// IP protocol numbers (IANA).
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// IPsec authentication header, an extension header in IPv6.
    pub const AUTHENTICATION: u8 = 51;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// Mobility header (RFC 6275).
    pub const MOBILITY: u8 = 135;
}

/// Extension headers followed before a packet is called malformed.
const MAX_EXTENSION_HEADERS: u32 = 8;

/// Random access to a packet's bytes.
pub trait Bytes: Copy {
    /// `N` bytes from `offset`, if the packet is that long.
    fn load<const N: usize>(self, offset: u32) -> Option<[u8; N]>;
}

impl Bytes for &[u8] {
    #[inline(always)]
    fn load<const N: usize>(self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}

/// What the device puts first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// An Ethernet header.
    Ethernet,
    /// The IP header.
    Ip,
}

/// What a packet is to the verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Belongs to a flow by its addresses, protocol and ports.
    #[default]
    Flow,
    /// ARP, or neighbour discovery that cannot have crossed a router.
    Neighbour,
    /// An ICMP error; [`Packet::inner`] is where the packet it is about begins.
    IcmpError,
    /// ICMP that is neither echo nor error.
    IcmpOther,
    /// A fragment that is not the first: no ports.
    LaterFragment,
}

/// The parts of a packet that count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: Addr,
    /// Destination address.
    pub destination: Addr,
    /// Source port; for ICMP echo the identifier.
    pub source_port: u16,
    /// Destination port; for ICMP type × 256 + code.
    pub destination_port: u16,
    /// Fragment identification.
    pub fragment_id: u32,
    /// Offset of the packet that an ICMP error quotes.
    pub inner: u32,
    /// Protocol after all extension headers.
    pub protocol: u8,
    /// What it is.
    pub kind: Kind,
    /// The first of several fragments.
    pub first_fragment: bool,
    /// Opens a connection whatever was before: TCP SYN without ACK, SCTP INIT, an echo request.
    pub opens: bool,
    /// TCP FIN, SCTP SHUTDOWN.
    pub finishes: bool,
    /// TCP RST, SCTP ABORT.
    pub resets: bool,
}

/// How much of the transport header there is to expect.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// All of it.
    Whole,
    /// The eight bytes that an ICMP error quotes at least (RFC 792).
    Quoted,
}

/// Parses a packet from its first byte.
///
/// # Errors
/// [`Reason::NotIp`] and [`Reason::Malformed`].
#[inline(always)]
pub fn packet<B: Bytes>(bytes: B, start: Start, packet: &mut Packet) -> Result<(), Reason> {
    let offset = match start {
        Start::Ip => 0,
        Start::Ethernet => match bytes.load::<2>(12).map(u16::from_be_bytes) {
            Some(0x0800 | 0x86dd) => 14,
            Some(0x0806) => {
                packet.kind = Kind::Neighbour;
                return Ok(());
            }
            Some(_) => return Err(Reason::NotIp),
            None => return Err(Reason::Malformed),
        },
    };
    ip(bytes, offset, Depth::Whole, packet)
}

/// Parses the packet that an ICMP error quotes, as far as its ports.
///
/// # Errors
/// [`Reason::Malformed`].
#[inline(always)]
pub fn quoted<B: Bytes>(bytes: B, offset: u32, packet: &mut Packet) -> Result<(), Reason> {
    ip(bytes, offset, Depth::Quoted, packet)
}

/// Only the source address, for the check at the tunnel device.
///
/// # Errors
/// [`Reason::Malformed`].
#[inline(always)]
pub fn addresses<B: Bytes>(bytes: B, packet: &mut Packet) -> Result<(), Reason> {
    match bytes.load::<1>(0) {
        Some([first]) if first >> 4 == 4 => {
            let header: [u8; 20] = bytes.load(0).ok_or(Reason::Malformed)?;
            ipv4_addresses(&header, packet);
            packet.protocol = header[9];
        }
        Some([first]) if first >> 4 == 6 => {
            let header: [u8; 40] = bytes.load(0).ok_or(Reason::Malformed)?;
            ipv6_addresses(&header, packet)?;
            packet.protocol = header[6];
        }
        _ => return Err(Reason::Malformed),
    }
    Ok(())
}

#[inline(always)]
fn ipv4_addresses(header: &[u8; 20], packet: &mut Packet) {
    packet.source = Addr::v4([header[12], header[13], header[14], header[15]]);
    packet.destination = Addr::v4([header[16], header[17], header[18], header[19]]);
}

#[inline(always)]
fn ipv6_addresses(h: &[u8; 40], packet: &mut Packet) -> Result<(), Reason> {
    packet.source = Addr::v6([
        h[8], h[9], h[10], h[11], h[12], h[13], h[14], h[15], h[16], h[17], h[18], h[19], h[20], h[21],
        h[22], h[23],
    ]);
    packet.destination = Addr::v6([
        h[24], h[25], h[26], h[27], h[28], h[29], h[30], h[31], h[32], h[33], h[34], h[35], h[36], h[37],
        h[38], h[39],
    ]);
    // On the wire an IPv4-mapped address is a forgery (RFC 4942, 2.2); here it would pass for the IPv4 address.
    if packet.source.is_v4() || packet.destination.is_v4() { Err(Reason::Malformed) } else { Ok(()) }
}

#[inline(always)]
fn ip<B: Bytes>(bytes: B, offset: u32, depth: Depth, packet: &mut Packet) -> Result<(), Reason> {
    match bytes.load::<1>(offset) {
        Some([first]) if first >> 4 == 4 => ipv4(bytes, offset, depth, packet),
        Some([first]) if first >> 4 == 6 => ipv6(bytes, offset, depth, packet),
        _ => Err(Reason::Malformed),
    }
}

/// RFC 791.
#[inline(always)]
fn ipv4<B: Bytes>(bytes: B, offset: u32, depth: Depth, packet: &mut Packet) -> Result<(), Reason> {
    let header: [u8; 20] = bytes.load(offset).ok_or(Reason::Malformed)?;
    let length = u32::from(header[0] & 0x0f) * 4;
    if length < 20 {
        return Err(Reason::Malformed);
    }
    ipv4_addresses(&header, packet);
    packet.protocol = header[9];
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    packet.fragment_id = u32::from(u16::from_be_bytes([header[4], header[5]]));
    if packet.protocol == protocol::ICMPV6 {
        return Err(Reason::Malformed);
    }
    fragmented(fragment & 0x1fff, fragment & 0x2000 != 0, packet)?;
    transport(bytes, offset + length, depth, 0, packet)
}

/// RFC 8200, with its extension headers.
#[inline(always)]
fn ipv6<B: Bytes>(bytes: B, offset: u32, depth: Depth, packet: &mut Packet) -> Result<(), Reason> {
    let header: [u8; 40] = bytes.load(offset).ok_or(Reason::Malformed)?;
    ipv6_addresses(&header, packet)?;
    let mut next = header[6];
    let mut at = offset + 40;
    for _ in 0..MAX_EXTENSION_HEADERS {
        match next {
            protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION_OPTIONS | protocol::MOBILITY => {
                let [following, length] = bytes.load(at).ok_or(Reason::Malformed)?;
                next = following;
                at += (u32::from(length) + 1) * 8;
            }
            protocol::AUTHENTICATION => {
                let [following, length] = bytes.load(at).ok_or(Reason::Malformed)?;
                next = following;
                at += (u32::from(length) + 2) * 4;
            }
            protocol::FRAGMENT => {
                let fragment: [u8; 8] = bytes.load(at).ok_or(Reason::Malformed)?;
                let field = u16::from_be_bytes([fragment[2], fragment[3]]);
                next = fragment[0];
                at += 8;
                packet.protocol = next;
                packet.fragment_id = u32::from_be_bytes([fragment[4], fragment[5], fragment[6], fragment[7]]);
                fragmented(field >> 3, field & 1 != 0, packet)?;
                if packet.kind == Kind::LaterFragment {
                    return Ok(());
                }
            }
            _ => {
                if next == protocol::ICMP {
                    return Err(Reason::Malformed);
                }
                packet.protocol = next;
                return transport(bytes, at, depth, header[7], packet);
            }
        }
    }
    Err(Reason::Malformed)
}

/// Notes what fragment it is; `offset` in units of eight bytes.
#[inline(always)]
fn fragmented(offset: u16, more: bool, packet: &mut Packet) -> Result<(), Reason> {
    if offset == 0 {
        packet.first_fragment = more;
        return Ok(());
    }
    // A fragment that begins within the TCP header could rewrite its flags behind our back (RFC 1858).
    if offset == 1 && packet.protocol == protocol::TCP {
        return Err(Reason::Malformed);
    }
    packet.kind = Kind::LaterFragment;
    Ok(())
}

#[inline(always)]
fn transport<B: Bytes>(
    bytes: B,
    at: u32,
    depth: Depth,
    hop_limit: u8,
    packet: &mut Packet,
) -> Result<(), Reason> {
    if packet.kind == Kind::LaterFragment {
        return Ok(());
    }
    match packet.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            let ports: [u8; 4] = bytes.load(at).ok_or(Reason::Malformed)?;
            packet.source_port = u16::from_be_bytes([ports[0], ports[1]]);
            packet.destination_port = u16::from_be_bytes([ports[2], ports[3]]);
            if depth == Depth::Quoted {
                return Ok(());
            }
            if packet.protocol == protocol::TCP {
                // RFC 9293: FIN 1, SYN 2, RST 4, ACK 16.
                let [flags] = bytes.load(at + 13).ok_or(Reason::Malformed)?;
                packet.opens = flags & 0b1_0010 == 0b0_0010;
                packet.finishes = flags & 1 != 0;
                packet.resets = flags & 4 != 0;
            } else if packet.protocol == protocol::SCTP {
                // RFC 9260: the first chunk's type; INIT 1, ABORT 6, SHUTDOWN COMPLETE 14.
                let [chunk] = bytes.load(at + 12).ok_or(Reason::Malformed)?;
                packet.opens = chunk == 1;
                packet.resets = chunk == 6 || chunk == 14;
            }
            Ok(())
        }
        protocol::ICMP | protocol::ICMPV6 => icmp(bytes, at, hop_limit, packet),
        _ => Ok(()),
    }
}

/// RFC 792 and RFC 4443.
#[inline(always)]
fn icmp<B: Bytes>(bytes: B, at: u32, hop_limit: u8, packet: &mut Packet) -> Result<(), Reason> {
    let header: [u8; 8] = match bytes.load(at) {
        Some(header) => header,
        None => return Err(Reason::Malformed),
    };
    let (kind, code) = (header[0], header[1]);
    let v6 = packet.protocol == protocol::ICMPV6;
    packet.destination_port = u16::from_be_bytes([kind, code]);
    let (request, reply) = if v6 { (128, 129) } else { (8, 0) };
    packet.kind = if kind == request || kind == reply {
        packet.source_port = u16::from_be_bytes([header[4], header[5]]);
        packet.opens = kind == request;
        Kind::Flow
    } else if if v6 { matches!(kind, 1..=4) } else { matches!(kind, 3 | 4 | 11 | 12) } {
        packet.inner = at + 8;
        Kind::IcmpError
    } else if v6 && matches!(kind, 133..=137) && hop_limit == 255 && !packet.first_fragment {
        // RFC 4861: a hop limit of 255 proves that no router forwarded it; RFC 6980: never fragmented.
        Kind::Neighbour
    } else {
        Kind::IcmpOther
    };
    Ok(())
}
