//! A TCP segment or UDP datagram, read for joining it with its neighbours.

use super::checksum::Sum;

/// TCP's protocol number.
pub const TCP: u8 = 6;
/// UDP's protocol number.
pub const UDP: u8 = 17;
pub(crate) const FIN: u8 = 1;
pub(crate) const PSH: u8 = 8;
const ACK: u8 = 0x10;

/// Most bytes of a joined packet, by the length field of IPv4.
const MAX_PACKET: usize = 65_535;

/// A whole packet of one flow.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// All of it.
    pub packet: &'a [u8],
    /// The IP header, without options or extensions.
    pub ip: &'a [u8],
    /// The transport header with its options.
    pub transport: &'a [u8],
    /// What it carries.
    pub payload: &'a [u8],
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
}

impl<'a> Segment<'a> {
    /// Reads the headers; `None` for fragments, IP options, extension headers, other protocols, and lengths that are
    /// not the packet's.
    pub fn parse(packet: &'a [u8]) -> Option<Self> {
        let u16_at = |at: usize| packet.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes);
        let (ip_header, protocol, length) = match *packet.first()? {
            // Neither MF nor an offset.
            0x45 if u16_at(6)? & 0x3fff == 0 => (20, *packet.get(9)?, usize::from(u16_at(2)?)),
            first if first >> 4 == 6 => (40, *packet.get(6)?, usize::from(u16_at(4)?) + 40),
            _ => return None,
        };
        if length != packet.len() {
            return None;
        }
        let (ip, rest) = packet.split_at_checked(ip_header)?;
        let header = match protocol {
            TCP => usize::from(rest.get(12)? >> 4) * 4,
            UDP if rest.get(4..6)? == u16::try_from(rest.len()).ok()?.to_be_bytes() => 8,
            _ => return None,
        };
        let (transport, payload) = rest.split_at_checked(header)?;
        let sound = protocol == UDP || header >= 20;
        sound.then_some(Self { packet, ip, transport, payload, protocol })
    }

    /// Whether it is IPv6.
    pub fn is_ipv6(&self) -> bool {
        self.ip.len() == 40
    }

    /// Both addresses, one behind the other.
    pub fn addresses(&self) -> &'a [u8] {
        self.ip.get(if self.is_ipv6() { 8 } else { 12 }..).unwrap_or_default()
    }

    /// Where its transport header has the checksum.
    pub fn checksum_offset(&self) -> usize {
        if self.protocol == TCP { 16 } else { 6 }
    }

    /// Whether both are of one flow, in the same direction.
    pub fn same_flow(&self, other: &Self) -> bool {
        self.protocol == other.protocol
            && self.transport.get(..4) == other.transport.get(..4)
            && self.addresses() == other.addresses()
    }

    /// Whether it may be joined with others: plain data with the checksums that any sender would have computed,
    /// for the kernel trusts the joined packet.
    pub fn is_joinable(&self) -> bool {
        let plain = self.protocol == UDP || self.flags() & !PSH == ACK;
        plain && !self.payload.is_empty() && self.has_right_checksums()
    }

    fn has_right_checksums(&self) -> bool {
        if !self.is_ipv6() && Sum::default().with(self.ip).finish() != [0, 0] {
            return false;
        }
        let at = self.checksum_offset();
        let Some(there) = self.transport.get(at..at + 2) else { return false };
        // Subtracting it is adding its complement.
        let without: [u8; 2] = [!there.first().unwrap_or(&0), !there.last().unwrap_or(&0)];
        let length = (self.transport.len() + self.payload.len()) as u16;
        let sum = Sum::default()
            .with_pseudo_header(self.addresses(), self.protocol, length)
            .with(self.transport)
            .with(self.payload)
            .with(&without);
        there == if self.protocol == TCP { sum.finish() } else { sum.finish_udp() }
    }

    /// Whether it says that data ends here for now.
    pub fn is_pushed(&self) -> bool {
        self.protocol == TCP && self.flags() & PSH != 0
    }

    /// Whether it is what splitting the joined packet of `first` and its followers, `count` in all and each
    /// as long, would put next.
    pub fn continues(&self, first: &Self, count: usize) -> bool {
        let size = first.payload.len();
        let same = |a: &[u8], b: &[u8], range: std::ops::Range<usize>| a.get(range.clone()) == b.get(range);
        let ip = if self.is_ipv6() {
            // Class and flow label; next header and hop limit.
            same(self.ip, first.ip, 0..4) && same(self.ip, first.ip, 6..8)
        } else {
            // Class; DF; TTL.
            let next = self.number(self.ip, 4).wrapping_sub(first.number(first.ip, 4));
            same(self.ip, first.ip, 0..2) && same(self.ip, first.ip, 6..10) && next == count as u16
        };
        let transport = self.protocol == UDP || {
            let next = self.sequence().wrapping_sub(first.sequence());
            let end = self.transport.len();
            next == (count * size) as u32
                && end == first.transport.len()
                // Acknowledgement and header length; window; urgent pointer and options.
                && same(self.transport, first.transport, 8..13)
                && same(self.transport, first.transport, 14..16)
                && same(self.transport, first.transport, 18..end)
        };
        let headers = first.ip.len() + first.transport.len();
        ip && transport
            && self.payload.len() <= size
            && headers + count * size + self.payload.len() <= MAX_PACKET
    }

    fn flags(&self) -> u8 {
        self.transport.get(13).copied().unwrap_or_default()
    }

    fn sequence(&self) -> u32 {
        self.transport.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
    }

    fn number(&self, header: &[u8], at: usize) -> u16 {
        header.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
    }
}
