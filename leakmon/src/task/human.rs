//! Figures as people read them.

use std::time::Duration;

/// A duration in at most two units: `850ns`, `1.2ms`, `4.2s`, `2m10s`, `3d4h`.
pub fn duration(duration: Duration) -> String {
    let ns = duration.as_nanos();
    let scaled = |unit: u128, name: &str| {
        if ns < 10 * unit {
            // One decimal, cut and not rounded, so that no unit overflows.
            let tenths = ns * 10 / unit;
            if tenths.is_multiple_of(10) {
                format!("{}{name}", tenths / 10)
            } else {
                format!("{}.{}{name}", tenths / 10, tenths % 10)
            }
        } else {
            format!("{}{name}", ns / unit)
        }
    };
    let pair = |big: u64, big_name: &str, small: u64, small_name: &str| {
        if small == 0 {
            format!("{big}{big_name}")
        } else {
            format!("{big}{big_name}{small}{small_name}")
        }
    };
    let seconds = duration.as_secs();
    match seconds {
        0 if ns < 1_000 => format!("{ns}ns"),
        0 if ns < 1_000_000 => scaled(1_000, "µs"),
        0 => scaled(1_000_000, "ms"),
        1..60 => scaled(1_000_000_000, "s"),
        60..3600 => pair(seconds / 60, "m", seconds % 60, "s"),
        3600..86_400 => pair(seconds / 3600, "h", seconds % 3600 / 60, "m"),
        _ => pair(seconds / 86_400, "d", seconds % 86_400 / 3600, "h"),
    }
}

/// An exact count with thousands separators: `1,234,567`.
pub fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// So many things, whose plural ends in an s: `1 site`, `1,234 sites`.
pub fn things(number: u64, one: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{} {one}{s}", count(number))
}

/// A change with its sign, to one decimal where it is small: `+40`, `-0.5`, `0`.
pub fn change(change: f64) -> String {
    if !change.is_finite() {
        return "-".to_owned();
    }
    let size = change.abs();
    let sign = if change < 0.0 { '-' } else { '+' };
    let tenths = (size * 10.0).round();
    if tenths == 0.0 {
        "0".to_owned()
    } else if tenths < 100.0 && tenths % 10.0 != 0.0 {
        format!("{sign}{:.1}", tenths / 10.0)
    } else {
        format!("{sign}{}", count(size.round() as u64))
    }
}

/// Makes text of a watched process safe for a terminal: characters that would
/// move the cursor, change colours, or reorder or hide text become `?`.
pub fn safe(text: &str) -> std::borrow::Cow<'_, str> {
    let harmful = |c: char| {
        c.is_control()
            || matches!(c,
                '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e0fff}')
    };
    if text.chars().any(harmful) {
        text.chars()
            .map(|c| if harmful(c) { '?' } else { c })
            .collect::<String>()
            .into()
    } else {
        text.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (ns, text) in [
            (0, "0ns"),
            (850, "850ns"),
            (1_000, "1µs"),
            (12_000, "12µs"),
            (1_250_000, "1.2ms"),
            (350_000_000, "350ms"),
            (999_999_999, "999ms"),
            (1_000_000_000, "1s"),
            (4_200_000_000, "4.2s"),
            (59_999_999_999, "59s"),
            (60_000_000_000, "1m"),
            (130_000_000_000, "2m10s"),
            (3_900_000_000_000, "1h5m"),
            (273_600_000_000_000, "3d4h"),
        ] {
            assert_eq!(duration(Duration::from_nanos(ns)), text);
        }
    }

    #[test]
    fn plurals() {
        assert_eq!(things(0, "site"), "0 sites");
        assert_eq!(things(1, "site"), "1 site");
        assert_eq!(things(1_234, "site"), "1,234 sites");
    }

    #[test]
    fn counts() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1000), "1,000");
        assert_eq!(count(1234567), "1,234,567");
    }

    #[test]
    fn changes() {
        for (value, text) in [
            (0.0, "0"),
            (-0.04, "0"),
            (0.5, "+0.5"),
            (-2.0, "-2"),
            (9.96, "+10"),
            (40.2, "+40"),
            (-1234.0, "-1,234"),
            (f64::NAN, "-"),
        ] {
            assert_eq!(change(value), text);
        }
    }

    #[test]
    fn escapes_do_not_reach_the_terminal() {
        assert_eq!(
            safe("main.\u{1b}[31mf\r\n\u{9b}\u{202e}"),
            "main.?[31mf????"
        );
        assert_eq!(safe("main.Größe·f"), "main.Größe·f");
    }
}
