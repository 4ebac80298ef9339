//! What stands before each packet on a TUN with IFF_VNET_HDR (`struct virtio_net_hdr`, virtio 1.2, 5.1.6).

/// The checksum is the pseudo-header's only and is to be completed.
const NEEDS_CSUM: u8 = 1;
/// Beside the type: some segment has ECN's CWR flag.
const GSO_ECN: u8 = 0x80;

/// What to cut a packet into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gso {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams over either.
    Udp,
}

/// The header, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    /// Length of the headers before the payload; a hint only.
    pub header_length: u16,
    /// Payload of each packet that this one is to be cut into.
    pub gso_size: u16,
    /// Where the checksummed part begins: at the transport header.
    pub checksum_start: u16,
    /// Where in that part the checksum is.
    pub checksum_offset: u16,
}

impl VnetHeader {
    /// Its length.
    pub const SIZE: usize = 10;

    /// Of a packet to be cut by the kernel, which completes the checksums too.
    pub fn segmented(gso: Gso) -> Self {
        let gso_type = match gso {
            Gso::Tcp4 => 1,
            Gso::Tcp6 => 4,
            Gso::Udp => 5,
        };
        Self { flags: NEEDS_CSUM, gso_type, ..Self::default() }
    }

    /// From the kernel's, in the machine's byte order (TUNSETVNETLE is not used).
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let [flags, gso_type, a, b, c, d, e, f, g, h] = *bytes;
        let [header_length, gso_size, checksum_start, checksum_offset] =
            [[a, b], [c, d], [e, f], [g, h]].map(u16::from_ne_bytes);
        Self { flags, gso_type, header_length, gso_size, checksum_start, checksum_offset }
    }

    /// For the kernel.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let [[a, b], [c, d], [e, f], [g, h]] =
            [self.header_length, self.gso_size, self.checksum_start, self.checksum_offset]
                .map(u16::to_ne_bytes);
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h]
    }

    /// Whether the checksum is to be completed.
    pub fn needs_checksum(&self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }

    /// Whether the packet is to be cut.
    pub fn is_segmented(&self) -> bool {
        self.gso_type != 0
    }

    /// Into what; `None` also for a type that we never ask the kernel for.
    pub fn gso(&self) -> Option<Gso> {
        match self.gso_type & !GSO_ECN {
            1 => Some(Gso::Tcp4),
            4 => Some(Gso::Tcp6),
            5 => Some(Gso::Udp),
            _ => None,
        }
    }
}
