//! Packets on their way out of the core, in one buffer that is used again.

/// A packet waiting in a [`Batch`], with where it goes.
#[derive(Debug)]
struct Item<T> {
    start: usize,
    end: usize,
    to: T,
}

/// Packets in order. Space is reserved, written in place by the protocol core, then committed.
#[derive(Debug)]
pub struct Batch<T> {
    arena: Vec<u8>,
    used: usize,
    items: Vec<Item<T>>,
}

impl<T> Default for Batch<T> {
    fn default() -> Self {
        Self { arena: Vec::new(), used: 0, items: Vec::new() }
    }
}

impl<T> Batch<T> {
    /// Exactly `size` bytes to write the next packet into. What is in them is undefined.
    pub fn space(&mut self, size: usize) -> &mut [u8] {
        let end = self.used + size;
        if self.arena.len() < end {
            self.arena.resize(end.next_power_of_two(), 0);
        }
        self.arena.get_mut(self.used..end).unwrap_or_default()
    }

    /// Makes the first `length` bytes of the last [`Batch::space`] the next packet.
    pub fn commit(&mut self, length: usize, to: T) {
        let start = self.used;
        self.used = (start + length).min(self.arena.len());
        self.items.push(Item { start, end: self.used, to });
    }

    /// Copies a packet in.
    pub fn push(&mut self, packet: &[u8], to: T) {
        self.space(packet.len()).copy_from_slice(packet);
        self.commit(packet.len(), to);
    }

    /// The packets, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &T)> {
        self.items.iter().map(|item| (self.arena.get(item.start..item.end).unwrap_or_default(), &item.to))
    }

    /// How many packets wait.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Forgets the packets and keeps the buffer.
    pub fn clear(&mut self) {
        self.used = 0;
        self.items.clear();
    }
}

/// Everything one step of the core wants sent.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Datagrams for the network.
    pub network: Batch<std::net::SocketAddr>,
    /// IP packets for the TUN device.
    pub tun: Batch<()>,
}

impl Outbox {
    /// Forgets both batches.
    pub fn clear(&mut self) {
        self.network.clear();
        self.tun.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_packets_keep_their_order_bytes_and_target() {
        let mut batch = Batch::default();
        batch.push(b"one", 1);
        batch.space(100)[..5].copy_from_slice(b"three");
        batch.commit(5, 3);
        batch.push(b"", 0);
        let seen: Vec<_> = batch.iter().map(|(bytes, to)| (bytes.to_vec(), *to)).collect();
        assert_eq!(seen, [(b"one".to_vec(), 1), (b"three".to_vec(), 3), (b"".to_vec(), 0)]);
        batch.clear();
        assert!(batch.is_empty());
    }
}
