//! What must hold for any burst: sealed and opened as by `ring`. The fuzz target calls it, and the test that replays its
//! corpus.

use mesh_noise::lanes::{self, Engine, Packet, TAG};

/// Longest text.
const LONGEST: usize = 2100;

/// The input in order: key, first counter, how many packets; then for each its length, what is changed in it before it is
/// opened, and where. What is missing is zero.
pub fn lanes(data: &[u8]) {
    let mut input = data.iter().copied();
    let mut byte = || input.next().unwrap_or(0);
    let key: [u8; 32] = std::array::from_fn(|_| byte());
    let first = u64::from_le_bytes(std::array::from_fn(|_| byte()));
    let count = usize::from(byte()) % 50;
    let mut plain = Vec::new();
    let mut changes = Vec::new();
    for n in 0..count {
        let length = usize::from(u16::from_le_bytes([byte(), byte()])) % LONGEST;
        let fill = byte();
        let bytes: Vec<u8> = (0..length + TAG).map(|at| fill.wrapping_mul(at as u8) ^ fill).collect();
        plain.push((first.wrapping_add(n as u64), bytes));
        changes.push((byte(), usize::from(u16::from_le_bytes([byte(), byte()])) % (length + TAG)));
    }

    let sealed = by(&plain, |packets| Engine::Ring.seal(&key, packets));
    let mut changed = sealed.clone();
    for ((_, bytes), (bits, at)) in changed.iter_mut().zip(&changes) {
        // Half of them stay as they are.
        bytes[*at] ^= if bits % 2 == 1 { bits / 2 } else { 0 };
    }
    let mut expected = vec![false; count];
    let opened = by(&changed, |packets| Engine::Ring.open(&key, packets, &mut expected));

    type Seal = fn(&[u8; 32], &mut [Packet<'_>]);
    type Open = fn(&[u8; 32], &mut [Packet<'_>], &mut [bool]);
    let mut ways: Vec<(Seal, Open)> = vec![(lanes::seal, lanes::open)];
    if Engine::Avx512.is_supported() {
        ways.push((
            |key, packets| Engine::Avx512.seal(key, packets),
            |key, packets, authentic| {
                Engine::Avx512.open(key, packets, authentic);
            },
        ));
    } else {
        eprintln!("NOT TESTED: this CPU has no AVX-512 with IFMA and VBMI2");
    }
    for (seal, open) in ways {
        assert!(by(&plain, |packets| seal(&key, packets)) == sealed);
        let mut authentic = vec![true; count];
        let ours = by(&changed, |packets| open(&key, packets, &mut authentic));
        assert_eq!(authentic, expected);
        for (((_, ours), (_, theirs)), authentic) in ours.iter().zip(&opened).zip(&authentic) {
            let text = ours.len() - TAG;
            assert!(!authentic || ours[..text] == theirs[..text]);
        }
    }
    for (((authentic, (bits, _)), (_, bytes)), (_, plain)) in
        expected.iter().zip(&changes).zip(&opened).zip(&plain)
    {
        assert_eq!(*authentic, bits % 2 == 0 || bits / 2 == 0);
        let text = plain.len() - TAG;
        assert!(!authentic || bytes[..text] == plain[..text]);
    }
}

fn by(burst: &[(u64, Vec<u8>)], work: impl FnOnce(&mut [Packet<'_>])) -> Vec<(u64, Vec<u8>)> {
    let mut burst = burst.to_vec();
    let packets = burst.iter_mut().map(|(counter, bytes)| Packet { counter: *counter, bytes });
    work(&mut packets.collect::<Vec<_>>());
    burst
}
