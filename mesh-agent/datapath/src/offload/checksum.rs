//! The Internet checksum (RFC 1071). It does not depend on the byte order, so it is summed in the machine's own.

/// A sum under way. Whatever is added starts at an even place; only the last part may have an odd length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes: at most 2^32 words of them in all, far more than any packet has.
    #[must_use]
    pub fn with(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<8>();
        // Two sums of half words each, and no check for an overflow that cannot be: so this becomes vector code.
        let (mut low, mut high) = (0u64, 0u64);
        for word in words {
            let word = u64::from_ne_bytes(*word);
            low = low.wrapping_add(word & 0xffff_ffff);
            high = high.wrapping_add(word >> 32);
        }
        let mut last = [0; 8];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        let last = u64::from_ne_bytes(last);
        Self(self.0 + low + high + (last & 0xffff_ffff) + (last >> 32))
    }

    /// Adds what TCP and UDP sum up beside themselves (RFC 9293 3.1, RFC 8200 8.1): both addresses, one behind
    /// the other, the protocol, and the length of the transport header and payload.
    #[must_use]
    pub fn with_pseudo_header(self, addresses: &[u8], protocol: u8, length: u16) -> Self {
        let [high, low] = length.to_be_bytes();
        self.with(addresses).with(&[0, protocol, high, low])
    }

    /// The sum itself as it is in a packet that the kernel is to complete.
    pub fn partial(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum as it is in a packet.
    pub fn finish(self) -> [u8; 2] {
        self.partial().map(|byte| !byte)
    }

    /// The checksum of UDP, where zero means that there is none (RFC 768).
    pub fn finish_udp(self) -> [u8; 2] {
        match self.finish() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }
}
