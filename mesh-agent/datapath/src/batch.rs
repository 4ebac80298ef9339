//! Packets on their way out of the core, in one buffer that is used again.

use std::ops::Range;

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

/// Most datagrams in one send (UDP_MAX_SEGMENTS of kernels before 6.9).
pub const MAX_SEGMENTS: usize = 64;
/// Most bytes in one send, as for a single datagram over IPv4.
pub const MAX_RUN: usize = 65_507;

/// Packets of a [`Batch`] that go out together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run<'a, T> {
    /// All of them, one behind the other.
    pub bytes: &'a [u8],
    /// The length of each but perhaps the last.
    pub segment: usize,
    /// Where they go.
    pub to: &'a T,
}

impl<'a, T> Run<'a, T> {
    /// One by one. An empty packet is a run of its own.
    pub fn packets(&self) -> impl Iterator<Item = &'a [u8]> {
        let empty = self.bytes.is_empty().then_some(self.bytes);
        self.bytes.chunks(self.segment.max(1)).chain(empty)
    }
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

    /// Lets `change` have up to [`MAX_SEGMENTS`] of the packets, those numbered `items`, to write in.
    pub(crate) fn change(&mut self, items: Range<usize>, change: impl FnOnce(&mut [&mut [u8]])) {
        let mut list: [&mut [u8]; MAX_SEGMENTS] = std::array::from_fn(|_| Default::default());
        let items = self.items.get(items).unwrap_or_default();
        let mut rest = self.arena.as_mut_slice();
        let mut passed = 0;
        for (place, item) in list.iter_mut().zip(items) {
            let Some((_, tail)) = rest.split_at_mut_checked(item.start - passed) else { return };
            let Some((packet, tail)) = tail.split_at_mut_checked(item.end - item.start) else { return };
            (*place, rest, passed) = (packet, tail, item.end);
        }
        change(list.get_mut(..items.len()).unwrap_or_default());
    }

    /// The packets, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &T)> {
        self.items.iter().map(|item| (self.arena.get(item.start..item.end).unwrap_or_default(), &item.to))
    }

    /// The packets in runs that the kernel can send at once (UDP_SEGMENT): to one target and of one length, the
    /// last of a run perhaps shorter.
    pub fn runs(&self) -> impl Iterator<Item = Run<'_, T>>
    where
        T: PartialEq,
    {
        let mut rest = self.items.as_slice();
        std::iter::from_fn(move || {
            let first = rest.first()?;
            let segment = first.end - first.start;
            let mut count = 1;
            let mut end = first.end;
            while let Some(item) = rest.get(count) {
                let length = item.end - item.start;
                let full = end - first.start == count * segment;
                let fits = count < MAX_SEGMENTS && item.end - first.start <= MAX_RUN;
                if !full
                    || !fits
                    || length == 0
                    || length > segment
                    || item.start != end
                    || item.to != first.to
                {
                    break;
                }
                end = item.end;
                count += 1;
            }
            rest = rest.get(count..).unwrap_or_default();
            Some(Run { bytes: self.arena.get(first.start..end).unwrap_or_default(), segment, to: &first.to })
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_the_same_packets_in_the_same_order_within_the_limits(
            packets in prop::collection::vec((prop_oneof![Just(0usize), Just(7), Just(8), Just(1452)], 0u8..3), 0..200),
        ) {
            let mut batch = Batch::default();
            for (n, (length, to)) in packets.iter().enumerate() {
                batch.push(&vec![n as u8; *length], *to);
            }
            let mut split = Vec::new();
            for run in batch.runs() {
                prop_assert!(run.bytes.len() <= MAX_RUN && run.packets().count() <= MAX_SEGMENTS);
                split.extend(run.packets().map(|packet| (packet.to_vec(), *run.to)));
            }
            let expected: Vec<_> = batch.iter().map(|(packet, to)| (packet.to_vec(), *to)).collect();
            prop_assert_eq!(split, expected);
        }
    }

    #[test]
    fn equal_packets_make_one_run_and_a_shorter_one_ends_it() {
        let mut batch = Batch::default();
        for length in [9, 9, 9, 4, 9, 9] {
            batch.push(&vec![1; length], 'a');
        }
        batch.push(&[1; 9], 'b');
        let runs: Vec<_> = batch.runs().map(|run| (run.bytes.len(), run.segment, *run.to)).collect();
        assert_eq!(runs, [(31, 9, 'a'), (18, 9, 'a'), (9, 9, 'b')]);
    }

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
