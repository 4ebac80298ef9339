//! Answers as tables: pure functions from an answer to text.

pub(crate) mod events;
pub(crate) mod ipam;
pub(crate) mod keys;
pub(crate) mod peers;
pub(crate) mod policies;
pub(crate) mod status;

use comfy_table::{ContentArrangement, Table, presets};

/// A table without lines, as `kubectl` prints: easy to read, and to cut by columns.
fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

fn text(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// `5s`, `3m12s`, `2h05m`, `4d03h`.
fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    if days > 0 {
        format!("{days}d{:02}h", hours % 24)
    } else if hours > 0 {
        format!("{hours}h{:02}m", minutes % 60)
    } else if minutes > 0 {
        format!("{minutes}m{:02}s", seconds % 60)
    } else {
        format!("{seconds}s")
    }
}

/// Binary multiples, three digits: `512 B`, `1.4 KiB`, `23.0 MiB`.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_keep_two_units() {
        assert_eq!(
            [0, 59, 60, 192, 7500, 356_400].map(age),
            ["0s", "59s", "1m00s", "3m12s", "2h05m", "4d03h"].map(str::to_owned)
        );
    }

    #[test]
    fn bytes_change_unit_at_1024() {
        assert_eq!(
            [0, 1023, 1024, 1_500_000, u64::MAX].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "1.4 MiB", "16.0 EiB"].map(str::to_owned)
        );
    }
}
