//! Cuts a large packet from the kernel into those that fit the tunnel, as a network card would
//! (Linux Documentation/networking/segmentation-offloads.rst).

use super::checksum::Sum;
use super::segment::{FIN, PSH, TCP, UDP};
use super::vnet_header::{Gso, VnetHeader};

const CWR: u8 = 0x80;
const UDP_HEADER: usize = 8;

/// Completes the checksum of a packet that is sent as it is. `None` if there is none where the header says.
pub fn complete_checksum(header: &VnetHeader, packet: &mut [u8]) -> Option<()> {
    if !header.needs_checksum() {
        return Some(());
    }
    let summed = packet.get_mut(usize::from(header.checksum_start)..)?;
    let at = usize::from(header.checksum_offset);
    summed.get(at..at + 2)?;
    // The pseudo-header's sum stands where the checksum will be.
    let sum = Sum::default().with(summed);
    put(summed, at, if at == 6 { sum.finish_udp() } else { sum.finish() })
}

/// A large packet.
#[derive(Debug)]
pub struct SuperPacket<'a> {
    packet: &'a [u8],
    ipv6: bool,
    /// Length of the IPv4 header with its options.
    ip_header: usize,
    /// Where the transport header begins, behind all IP headers.
    transport: usize,
    /// Where the payload begins.
    payload: usize,
    segment: usize,
    protocol: u8,
    addresses: &'a [u8],
}

impl<'a> SuperPacket<'a> {
    /// Reads the headers; `None` if they do not fit each other or the packet.
    pub fn parse(header: &VnetHeader, packet: &'a [u8]) -> Option<Self> {
        let gso = header.gso()?;
        let first = *packet.first()?;
        let (ipv6, ip_header, addresses) = match first >> 4 {
            4 => (false, usize::from(first & 0xf) * 4, packet.get(12..20)?),
            6 => (true, 40, packet.get(8..40)?),
            _ => return None,
        };
        let transport = usize::from(header.checksum_start);
        let (protocol, header_length) = match gso {
            Gso::Udp => (UDP, UDP_HEADER),
            Gso::Tcp4 | Gso::Tcp6 => (TCP, usize::from(packet.get(transport + 12)? >> 4) * 4),
        };
        let right_family = match gso {
            Gso::Tcp4 => !ipv6,
            Gso::Tcp6 => ipv6,
            Gso::Udp => true,
        };
        let payload = transport + header_length;
        let segment = usize::from(header.gso_size);
        let sound = right_family
            && ip_header >= 20
            && transport >= ip_header
            && (ipv6 || transport == ip_header)
            && (protocol == UDP || header_length >= 20)
            && segment > 0
            && payload + segment <= usize::from(u16::MAX)
            && payload <= packet.len();
        sound.then_some(Self { packet, ipv6, ip_header, transport, payload, segment, protocol, addresses })
    }

    /// The packet itself.
    pub fn packet(&self) -> &'a [u8] {
        self.packet
    }

    /// Bytes of the longest packet it makes.
    pub fn largest(&self) -> usize {
        self.packet.len().min(self.payload + self.segment)
    }

    /// How many packets it makes: at least one.
    pub fn count(&self) -> usize {
        (self.packet.len() - self.payload).div_ceil(self.segment).max(1)
    }

    /// Writes the packet number `n` to the start of `out`; returns its length. `None` when there is no such packet,
    /// or no room for it.
    pub fn write(&self, n: usize, out: &mut [u8]) -> Option<usize> {
        let rest = self.packet.get(self.payload + n * self.segment..)?;
        let payload = rest.get(..self.segment).unwrap_or(rest);
        let last = payload.len() == rest.len();
        let length = self.payload + payload.len();
        let out = out.get_mut(..length)?;
        let (head, body) = out.split_at_mut_checked(self.payload)?;
        head.copy_from_slice(self.packet.get(..self.payload)?);
        body.copy_from_slice(payload);

        if self.ipv6 {
            put(out, 4, u16::try_from(length - self.ip_header).ok()?.to_be_bytes())?;
        } else {
            put(out, 2, u16::try_from(length).ok()?.to_be_bytes())?;
            let id = u16::from_be_bytes(take(out, 4)?).wrapping_add(n as u16);
            put(out, 4, id.to_be_bytes())?;
            put(out, 10, [0, 0])?;
            let checksum = Sum::default().with(out.get(..self.ip_header)?).finish();
            put(out, 10, checksum)?;
        }

        let transport = out.get_mut(self.transport..)?;
        let length = u16::try_from(transport.len()).ok()?;
        if self.protocol == TCP {
            let sequence = u32::from_be_bytes(take(transport, 4)?);
            put(transport, 4, sequence.wrapping_add((n * self.segment) as u32).to_be_bytes())?;
            let flags = transport.get_mut(13)?;
            if n > 0 {
                *flags &= !CWR;
            }
            if !last {
                *flags &= !(FIN | PSH);
            }
            put(transport, 16, [0, 0])?;
        } else {
            put(transport, 4, length.to_be_bytes())?;
            put(transport, 6, [0, 0])?;
        }
        let sum = Sum::default().with_pseudo_header(self.addresses, self.protocol, length).with(transport);
        match self.protocol {
            TCP => put(transport, 16, sum.finish())?,
            _ => put(transport, 6, sum.finish_udp())?,
        }
        Some(self.payload + payload.len())
    }
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) -> Option<()> {
    bytes.get_mut(at..at + N)?.copy_from_slice(&value);
    Some(())
}

fn take<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}
