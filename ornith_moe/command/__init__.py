"""The commands of `ornith-moe`, one file each: options, the call, what is printed."""
